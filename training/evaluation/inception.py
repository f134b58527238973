"""The Inception network that FID is defined with: shapes and names of the weights that pytorch-fid publishes.

It differs from torchvision's Inception v3 in three places, as the TensorFlow graph of 2015 does: average pooling
leaves the padding out, the last block pools by maximum, and the classifier has 1008 classes.

Source: Szegedy et al., "Rethinking the Inception architecture for computer vision", 2015; Heusel et al., "GANs trained
by a two time-scale update rule", 2017.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, FEATURES, CLASSES = 299, 2048, 1008

_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. With a stride of 2 it is not padded."""

    def __init__(
        self, width: int, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1, *, padded: bool = True
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(width, channels, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(features)))


class _Block(nn.Module):
    """Branches side by side. Each is a chain of layer names; a tuple at its end splits it in two."""

    branches: tuple[tuple[str | tuple[str, str], ...], ...]
    branch_pool: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            value = features
            for step in branch:
                if isinstance(step, tuple):
                    value = torch.cat([self.get_submodule(name)(value) for name in step], 1)
                else:
                    value = self.get_submodule(step)(value)
            found.append(value)
        return torch.cat([*found, self._pooled(features)], 1)

    def _pooled(self, features: Tensor) -> Tensor:
        return self.branch_pool(_average(features))


class _BlockA(_Block):
    branches = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(width, 64)
        self.branch5x5_1, self.branch5x5_2 = _Conv(width, 48), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(width, 64), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(width, pooled)


class _BlockB(_Block):
    branches = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(width, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(width, 64), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def _pooled(self, features: Tensor) -> Tensor:
        return _halve(features)


class _BlockC(_Block):
    branches = (
        ("branch1x1",),
        tuple(f"branch7x7_{i}" for i in (1, 2, 3)),
        tuple(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)),
    )

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _Conv(width, 192)
        self.branch7x7_1, self.branch7x7_2 = _Conv(width, inner), _Conv(inner, inner, row)
        self.branch7x7_3 = _Conv(inner, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(width, inner), _Conv(inner, inner, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(inner, inner, row), _Conv(inner, inner, column)
        self.branch7x7dbl_5 = _Conv(inner, 192, row)
        self.branch_pool = _Conv(width, 192)


class _BlockD(_Block):
    branches = (tuple(f"branch3x3_{i}" for i in (1, 2)), tuple(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(width, 192), _Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(width, 192), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, 3, 2)

    def _pooled(self, features: Tensor) -> Tensor:
        return _halve(features)


class _BlockE(_Block):
    branches = (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    )

    def __init__(self, width: int, *, last: bool) -> None:
        super().__init__()
        self._pool = _maximum if last else _average
        row, column = (1, 3), (3, 1)
        self.branch1x1 = _Conv(width, 320)
        self.branch3x3_1 = _Conv(width, 384)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, row), _Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(width, 448), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, row), _Conv(384, 384, column)
        self.branch_pool = _Conv(width, 192)

    def _pooled(self, features: Tensor) -> Tensor:
        return self.branch_pool(self._pool(features))


class FidInception(nn.Module):
    """Features ``[B,2048]`` of pictures ``[B,3,299,299]`` in [0,255]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b, self.Mixed_6c = _BlockC(768, 128), _BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = _BlockC(768, 160), _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b, self.Mixed_7c = _BlockE(1280, last=False), _BlockE(2048, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)  # unused; in the file, and what tells it from torchvision's

    def forward(self, levels: Tensor) -> Tensor:
        """Return features before the classifier, averaged over the picture."""
        features = (levels - 128) / 128
        for name, layer in self.named_children():
            if name == "fc":
                break
            features = layer(features)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                features = _halve(features)
        return features.mean((2, 3))
