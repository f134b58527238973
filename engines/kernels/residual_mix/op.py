"""``torch.ops.icexport.residual_mix``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import custom_op

from engines.kernels.host import check_channels, check_groups, check_shape, check_tensors, load_kernel
from engines.kernels.residual_mix import reference

NAME = "residual_mix"


@custom_op(f"icexport::{NAME}", mutates_args=(), device_types="cpu")
def residual_mix(
    accumulated: Tensor,
    main: Tensor,
    skip: Tensor,
    main_gamma: Tensor,
    main_beta: Tensor,
    skip_gamma: Tensor,
    skip_beta: Tensor,
    mix: Tensor,
    index: int,
    first_channel: int,
    num_groups: int,
    eps: float,
    normalise_skip: bool,
) -> Tensor:
    """``accumulated + mix[index] * relu(group_norm(main) + shortcut)``.

    The shortcut is some channels of ``skip``, bilinearly resized to the size of ``main`` (half-pixel centres, no
    antialiasing), and then GroupNorm'ed if ``normalise_skip``.

    Args:
        accumulated: ``[B,P,H,W]`` float32, float16 or bfloat16; any strides: the sum over the taps before.
        main: ``[B,P,H,W]``, of the same dtype, like every tensor here: the last convolution's output.
        skip: ``[B,Cs,h,w]``.
        main_gamma: ``[P]``: factor of the GroupNorm of main.
        main_beta: ``[P]``: addend of the GroupNorm of main.
        skip_gamma: ``[P]``: factor of the GroupNorm of the shortcut; not read unless ``normalise_skip``.
        skip_beta: ``[P]``: addend of the GroupNorm of the shortcut; not read unless ``normalise_skip``.
        mix: ``[L]``: weights of the taps.
        index: Which of them is this tap's.
        first_channel: The shortcut is channels ``first_channel`` to ``first_channel + P`` of skip.
        num_groups: Of both GroupNorms, whose statistics are those of maps at H x W, in float32.
        eps: Of both GroupNorms.
        normalise_skip: Whether the shortcut has a GroupNorm.

    Returns:
        ``[B,P,H,W]``, contiguous.

    Raises:
        ValueError: If the arguments do not fit each other.
        BackendUnavailableError: On a GPU without Triton.
    """
    tensors = (accumulated, main, skip, main_gamma, main_beta, skip_gamma, skip_beta, mix)
    _check(*tensors, index, first_channel, num_groups, eps)
    options = (index, first_channel, num_groups, eps, normalise_skip)
    arguments: tuple[Any, ...] = (*(tensor.contiguous() for tensor in tensors), *options)
    return reference.residual_mix(*arguments)


@residual_mix.register_fake
def _empty(
    accumulated: Tensor,
    main: Tensor,
    skip: Tensor,
    main_gamma: Tensor,
    main_beta: Tensor,
    skip_gamma: Tensor,
    skip_beta: Tensor,
    mix: Tensor,
    index: int,
    first_channel: int,
    num_groups: int,
    eps: float,
    normalise_skip: bool,
) -> Tensor:
    tensors = (accumulated, main, skip, main_gamma, main_beta, skip_gamma, skip_beta, mix)
    _check(*tensors, index, first_channel, num_groups, eps)
    return main.new_empty(main.shape)


@residual_mix.register_kernel("cuda")
def run_kernel(
    accumulated: Tensor,
    main: Tensor,
    skip: Tensor,
    main_gamma: Tensor,
    main_beta: Tensor,
    skip_gamma: Tensor,
    skip_beta: Tensor,
    mix: Tensor,
    index: int,
    first_channel: int,
    num_groups: int,
    eps: float,
    normalise_skip: bool,
) -> Tensor:
    """What a GPU runs; on CPU tensors only in Triton's interpreter."""
    tensors = (accumulated, main, skip, main_gamma, main_beta, skip_gamma, skip_beta, mix)
    out: Tensor = _empty(*tensors, index, first_channel, num_groups, eps, normalise_skip)
    contiguous = (tensor.contiguous() for tensor in tensors)
    load_kernel(NAME).launch(*contiguous, index, first_channel, num_groups, eps, normalise_skip, out)
    return out


def _check(
    accumulated: Tensor,
    main: Tensor,
    skip: Tensor,
    main_gamma: Tensor,
    main_beta: Tensor,
    skip_gamma: Tensor,
    skip_beta: Tensor,
    mix: Tensor,
    index: int,
    first_channel: int,
    num_groups: int,
    eps: float,
) -> None:
    vectors = {"main_gamma": main_gamma, "main_beta": main_beta, "skip_gamma": skip_gamma, "skip_beta": skip_beta}
    check_tensors(NAME, {"main": main, "accumulated": accumulated, "skip": skip, **vectors, "mix": mix})
    check_shape(NAME, "main", main, ("B", "P", "H", "W"))
    batch, channels = main.shape[:2]
    check_shape(NAME, "accumulated", accumulated, tuple(main.shape))
    check_shape(NAME, "skip", skip, (batch, "Cs", "h", "w"))
    for name, vector in vectors.items():
        check_shape(NAME, name, vector, (channels,))
    check_shape(NAME, "mix", mix, ("L",))
    if not 0 <= index < mix.shape[0]:
        raise ValueError(f"{NAME}: index is {index}, but the weights in mix are numbered 0 to {mix.shape[0] - 1}.")
    check_channels(NAME, "skip", skip, first_channel, channels)
    check_groups(NAME, channels, num_groups, eps)
