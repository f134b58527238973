"""The probe through its own kernels: the numbers of ``InnerControlProbe`` from a handful of launches.

Per tap: one stacked 1x1 projection at the tap's resolution, resize + GroupNorm + ReLU + time shift in one kernel, the
3x3 convolution, another GroupNorm + ReLU, a 1x1 projection, and one kernel for everything behind it: two GroupNorms,
the resized shortcut, ReLU, the mixing weight, the sum over taps. On a CPU the same operators run their references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engines.kernels  # noqa: F401  (registers torch.ops.icexport)
from icexport.models.probe import InnerControlProbe


class FusedProbe(nn.Module):
    """Runs an ``InnerControlProbe`` through ``torch.ops.icexport``.

    Args:
        probe: probe whose parameters and config are used; they are shared. Only the time layers are copied, to run as
            one.
    """

    time_weight: Tensor
    time_bias: Tensor
    ops: Any = torch.ops.icexport
    """Where the operators come from. An exporter puts its own nodes here."""

    def __init__(self, probe: InnerControlProbe) -> None:
        super().__init__()
        self.probe = probe
        self.config = probe.config
        if self.config.time_embed_dim is not None:
            for name in ("weight", "bias"):
                stacked = torch.cat([getattr(layer.time, name).detach() for layer in probe.bottlenecks])
                self.register_buffer(f"time_{name}", stacked, persistent=False)

    def forward(self, taps: Sequence[Tensor], time_embedding: Tensor | None = None) -> Tensor:
        """Read the control map; arguments and result are those of ``InnerControlProbe.forward``.

        Args:
            taps: one [B, dims[i], H_i, W_i] tensor per tap, coarse to fine.
            time_embedding: [B or 1, time_embed_dim]; not used when the config's ``time_embed_dim`` is None.

        Returns:
            [B, out_channels, output_scale * H, output_scale * W] for the last tap's H and W.

        Raises:
            ValueError: the number of taps or their channels do not fit the config.
        """
        height, width = (side * self.config.output_scale for side in taps[-1].shape[-2:])
        mix = self.probe.mixing_weights.softmax(0)
        total = taps[-1].new_zeros(taps[-1].shape[0], self.config.projection_dim, height, width)
        still = taps[-1].new_zeros(1, self.config.projection_dim // 4)
        shifts: Sequence[Tensor] = [still] * len(taps)
        if self.config.time_embed_dim is not None and time_embedding is not None:
            stacked = F.linear(time_embedding, self.time_weight, self.time_bias).relu()
            shifts = stacked.chunk(len(self.config.dims), dim=1)
        for index, (layer, tap) in enumerate(zip(self.probe.bottlenecks, taps, strict=True)):
            total = self._add_tap(total, layer, tap, shifts[index], still, mix, index)
        reading: Tensor = self.probe.output_head(total)
        return reading.tanh() if self.config.head_tanh else reading

    def _add_tap(
        self, total: Tensor, layer: Any, tap: Tensor, shift: Tensor, still: Tensor, mix: Tensor, index: int
    ) -> Tensor:
        """Return ``total + mix[index] * bottleneck(tap)``; all [B, projection_dim, H, W]."""
        height, width = total.shape[-2:]
        inner = layer.norm1.num_channels

        def normalise(x: Tensor, norm: nn.GroupNorm, shift: Tensor) -> Tensor:
            found: Tensor = self.ops.resize_group_norm_relu(
                x, norm.weight, norm.bias, shift, 0, height, width, norm.num_groups, norm.eps
            )
            return found

        projected = self.ops.dual_projection(tap, layer.project.weight.flatten(1))
        hidden = normalise(projected, layer.norm1, shift)
        hidden = normalise(layer.conv2(hidden), layer.norm2, still)
        # The third 1x1 convolution lies between two kernels that work on plain NCHW memory, where cuDNN and TensorRT
        # would convert to their channels-last layout and back: more traffic than the product itself.
        main = self.ops.dual_projection(hidden, layer.conv3.weight.flatten(1))
        # An identity shortcut is the tap itself, without a norm: the norm's place is filled with one that is not read.
        skip, skip_norm = (tap, layer.norm3) if layer.identity_shortcut else (projected, layer.shortcut_norm)
        mixed: Tensor = self.ops.residual_mix(
            total,
            main,
            skip,
            layer.norm3.weight,
            layer.norm3.bias,
            skip_norm.weight,
            skip_norm.bias,
            mix,
            index,
            0 if layer.identity_shortcut else inner,
            layer.norm3.num_groups,
            layer.norm3.eps,
            not layer.identity_shortcut,
        )
        return mixed
