"""The probe head as the official code evaluates it: taps resized to full size, concatenated, then convolved.

Written from the description of the architecture, in plain torch, to be measured beside icexport's own order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icexport.models.align import to_official
from icexport.models.probe import InnerControlProbe, ProbeConfig


class OfficialHead(nn.Module):
    """``AggregationNetwork`` of InnerControl, for configs without ``bottleneck_sequential``.

    Args:
        config: sizes of the network.

    Source: InnerControl (arXiv 2507.02321). Parameters have the official names, as ``align.to_official`` gives
    them.
    """

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.dims = config.dims
        self.bottleneck_layers = nn.ModuleList(_Bottleneck(dim, config) for dim in config.dims)
        self.mixing_weights = nn.Parameter(torch.ones(len(config.dims)))
        layers: list[nn.Module] = []
        for channels, width in zip((config.projection_dim, *config.head_dims), config.head_dims, strict=False):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        layers.append(nn.Conv2d(config.head_dims[-1], config.out_channels, 1))
        self.output_head = nn.Sequential(*layers, *([nn.Tanh()] if config.head_tanh else []))

    @classmethod
    def of(cls, probe: InnerControlProbe) -> OfficialHead:
        """Return the same network with the weights, dtype and device of a probe."""
        head = cls(probe.config).to(probe.mixing_weights)
        head.load_state_dict(to_official(probe))
        return head.eval()

    def forward(self, taps: Sequence[Tensor], time_embedding: Tensor) -> Tensor:
        """Read the control map.

        Args:
            taps: one ``[B, dims[i], H_i, W_i]`` tensor per tap, coarse to fine.
            time_embedding: ``[B or 1, E]``, before its SiLU.

        Returns:
            ``[B, out_channels, H, W]`` for the last tap's H and W.
        """
        size = taps[-1].shape[-2:]
        maps = [F.interpolate(tap, size, mode="bilinear", align_corners=False) for tap in taps]
        weights = self.mixing_weights.softmax(0)
        total: Tensor | None = None
        for index, features in enumerate(torch.split(torch.cat(maps, 1), list(self.dims), 1)):
            mixed = weights[index] * self.bottleneck_layers[index](features.contiguous(), time_embedding)
            total = mixed if total is None else total + mixed
        reading: Tensor = self.output_head(total)
        return reading


class _NormConv(nn.Conv2d):
    """A convolution without bias, and the GroupNorm behind it."""

    def __init__(self, channels: int, outputs: int, size: int, groups: int) -> None:
        super().__init__(channels, outputs, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(super().forward(x))
        return found


class _Bottleneck(nn.Module):
    """``[B, dim, H, W]`` -> ``[B, P, H, W]``."""

    def __init__(self, dim: int, config: ProbeConfig) -> None:
        super().__init__()
        out, groups = config.projection_dim, config.num_groups
        width = out // 4
        self.conv1 = _NormConv(dim, width, 1, groups)
        self.emb_layers = nn.Linear(config.time_embed_dim or 0, width)
        self.conv2 = _NormConv(width, width, 3, groups)
        self.conv3 = _NormConv(width, out, 1, groups)
        self.shortcut = nn.Identity() if dim == out else _NormConv(dim, out, 1, groups)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        hidden = self.conv1(x).relu() + self.emb_layers(time_embedding).relu()[:, :, None, None]
        result: Tensor = (self.conv3(self.conv2(hidden).relu()) + self.shortcut(x)).relu()
        return result
