"""Networks that read control maps from finished pictures, trained on pictures alone.

A judge differs from whatever a ControlNet was trained with in everything: architecture, seed, order of the pictures. A
ControlNet that learns to please a reward or a probe, and not to put things where they belong, gains nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.data.drawn import Draw
from training.loop.trainer import Task

NOISE = 0.03
"""Standard deviation of the noise on the pictures that a judge is trained on, of a range of 1."""


class Judge(nn.Module):
    """A convolutional encoder and decoder with skips.

    Reads maps ``[B,1,H,W]`` of pictures ``[B,3,H,W]`` in [0,1]; H and W are multiples of 8.
    """

    WIDTHS = (16, 32, 48, 64)

    def __init__(self) -> None:
        super().__init__()
        widths = self.WIDTHS
        self.encoder = nn.ModuleList(
            _block(before, width) for before, width in zip((3, *widths), widths, strict=False)
        )
        self.decoder = nn.ModuleList(
            _block(below + width, width) for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Read the maps."""
        skips = self._encode(pixels)
        features = skips.pop()
        for block, skip in zip(self.decoder, skips[::-1], strict=True):
            features = block(torch.cat((F.interpolate(features, scale_factor=2.0), skip), 1))
        maps: Tensor = self.head(features)
        return maps

    def features(self, pixels: Tensor) -> Tensor:
        """Return what the encoder makes of a picture, averaged over its area: ``[B,64]``, for image statistics."""
        return self._encode(pixels)[-1].mean((2, 3))

    def _encode(self, pixels: Tensor) -> list[Tensor]:
        features = pixels * 2 - 1
        skips: list[Tensor] = []
        for block in self.encoder:
            features = block(F.avg_pool2d(features, 2) if skips else features)
            skips.append(features)
        return skips

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Read what `save` wrote, frozen."""
        judge = cls()
        judge.load_state_dict(load_file(path))
        return judge.eval().requires_grad_(False)


class ReadingTask(Task):
    """Trains a network to read control maps, on pictures that are mirrored and slightly noisy.

    Args:
        network: takes pictures ``[B,3,H,W]`` in [0,1] to maps ``[B,1,H,W]``, or ``[B,H,W]``.
        name: name of the task.
        error: what is minimised. Mean absolute error suits depth; with sparse edges a blank map would have the least.
    """

    def __init__(
        self, network: nn.Module, name: str = "judge", error: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
    ) -> None:
        super().__init__()
        self.name = name
        self._error = error
        self.network = network.train().requires_grad_(True)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the loss of one batch of ``pixels`` and ``control``."""
        pixels, target = batch["pixels"], batch["control"][:, :1]
        if torch.rand((), generator=generator) < 0.5:
            pixels, target = pixels.flip(-1), target.flip(-1)
        noise = NOISE * torch.randn(pixels.shape, generator=generator)
        device = next(self.network.parameters()).device
        found = self.network((pixels + noise).clamp(0, 1).to(device))
        return {"loss": self._error(found.float().view_as(target), target.to(device))}

    def save(self, folder: Path) -> None:
        """Write the weights as ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "model.safetensors")


def draw_pictures(pictures: Tensor, maps: Tensor, batch_size: int) -> Draw:
    """Draw batches for `ReadingTask` from uint8 ``pictures`` ``[N,3,H,W]`` and ``maps`` ``[N,H,W]``."""

    def draw(generator: torch.Generator) -> dict[str, Any]:
        index = torch.randint(len(pictures), (batch_size,), generator=generator)
        control = (maps[index].float() / 255)[:, None].expand(-1, 3, -1, -1)
        return {"pixels": pictures[index].float() / 255, "control": control, "ids": [str(i) for i in index.tolist()]}

    return draw


def _block(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
    )  # fmt: skip
