"""Taps: the UNet activations that a probe reads, caught with forward hooks.

Hooks, unlike a replaced ``forward``, leave the UNet as it is, work with every diffusers version that keeps the module
names, and are traced by ``torch.export`` and by both ONNX exporters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from icexport.errors import UnsupportedOptionError, UsageError

TapKind = Literal["attn", "conv"]


class Taps:
    """The taps of one UNet, in up-block order: coarse to fine.

    Args:
        unet: a ``UNet2DConditionModel``; it is neither run nor changed here.
        kind: ``"attn"``: output of the self-attention ``attn1`` of the first transformer block of each attention
            module, before the residual add. ``"conv"``: output of the second convolution of each resnet, before the
            skip add.

    Attributes:
        kind: as given.
        names: path of each tapped module in the UNet.
        dims: channels of each tap.
        scales: how many times smaller than the latent each tap is, per side.

    Raises:
        UsageError: the kind is unknown, or the up blocks have no such module.

    Source: InnerControl (arXiv 2507.02321) taps ``attn``, Readout Guidance (arXiv 2312.02150) ``conv``.
    """

    def __init__(self, unet: UNet2DConditionModel, kind: TapKind = "attn") -> None:
        if kind not in ("attn", "conv"):
            raise UsageError(f"Unknown kind of tap {kind!r}: choose 'attn' or 'conv'.")
        self.kind: TapKind = kind
        self._unet = unet
        names: list[str] = []
        dims: list[int] = []
        scales: list[int] = []
        # An up block upsamples at its end, so its own taps are still at the size that it was given.
        upsamplings = sum(bool(block.upsamplers) for block in unet.up_blocks)
        for index, block in enumerate(unet.up_blocks):
            for name, channels in _block_taps(block, kind):
                names.append(f"up_blocks.{index}.{name}")
                dims.append(channels)
                scales.append(2**upsamplings)
            upsamplings -= bool(block.upsamplers)
        if not names:
            raise UsageError(
                f"This UNet has no taps of kind {kind!r}: its up blocks are "
                f"{', '.join(type(block).__name__ for block in unet.up_blocks)}. "
                f"Choose the other kind, or a UNet with attention in its up blocks."
            )
        self.names = tuple(names)
        self.dims = tuple(dims)
        self.scales = tuple(scales)

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """Record the taps of the UNet forward that runs inside the ``with`` block.

        Yields:
            A list, empty at first; after the forward it holds one [B, C, H, W] tensor per tap, in the order of
            ``names`` and in the UNet's dtype, part of the autograd graph. A second forward replaces the first's.

        Raises:
            UnsupportedOptionError: gradient checkpointing is on: the recomputation would record every tap again.
            UsageError: no forward ran, or the hooks were not called (a UNet that was compiled before).
        """
        if self._unet.is_gradient_checkpointing:
            raise UnsupportedOptionError(
                "Taps cannot be recorded from a UNet with gradient checkpointing, which runs its blocks twice. "
                "Call unet.disable_gradient_checkpointing(); the ControlNet may keep its own on."
            )
        taps: list[Tensor] = []
        with ExitStack() as hooks:
            hooks.enter_context(self._unet.register_forward_pre_hook(lambda *_: taps.clear()))
            for name in self.names:
                tapped = self._unet.get_submodule(name)
                if self.kind == "conv":
                    hooks.enter_context(
                        tapped.register_forward_hook(lambda _module, _args, output: taps.append(output))
                    )
                    continue
                read_size, record = _attention_hooks(taps)
                transformer = self._unet.get_submodule(name.partition(".transformer_blocks.")[0])
                hooks.enter_context(transformer.register_forward_pre_hook(read_size, with_kwargs=True))
                hooks.enter_context(tapped.register_forward_hook(record))
            yield taps
        if len(taps) != len(self.names):
            raise UsageError(
                f"Recorded {len(taps)} of {len(self.names)} taps. Run the UNet that these taps were made for, "
                f"not a compiled copy, inside record()."
            )


def _block_taps(block: nn.Module, kind: TapKind) -> Iterator[tuple[str, int]]:
    """Yield (path in the up block, channels) of each tap of ``block``."""
    if kind == "conv":
        for index, resnet in enumerate(block.resnets):  # type: ignore[arg-type]
            yield f"resnets.{index}.conv2", resnet.conv2.out_channels
        return
    for index, attention in enumerate(getattr(block, "attentions", ())):
        if hasattr(attention, "transformer_blocks"):
            attn1 = attention.transformer_blocks[0].attn1
            yield f"attentions.{index}.transformer_blocks.0.attn1", attn1.to_out[0].out_features


def _attention_hooks(taps: list[Tensor]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Make a pre-hook of a transformer, which gets [B, C, H, W], and a hook of its attention, giving [B, HW, C]."""
    size: list[int] = []

    def read_size(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        size[:] = hidden_states.shape[-2:]

    def record(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        batch, _, channels = output.shape
        taps.append(output.transpose(1, 2).reshape(batch, channels, *size))

    return read_size, record
