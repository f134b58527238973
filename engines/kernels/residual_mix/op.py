"""``torch.ops.icexport.residual_mix``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

from torch import Tensor

from engines.kernels.host import check_channels, check_groups, check_shape, check_tensors, define_op
from engines.kernels.residual_mix import reference

NAME = "residual_mix"


def result_shape(
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
) -> tuple[int, ...]:
    """Return ``(B, P, H, W)`` of the result.

    Raises:
        ValueError: if the arguments do not fit each other.
    """
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
    return tuple(main.shape)


residual_mix, run_kernel = define_op(reference.residual_mix, result_shape)
