"""What a backend takes of a CPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icexport.models.sizes import vae_factor

_FLOAT32 = 4


@dataclass(frozen=True)
class Footprint:
    """Factors from the sizes of a model to bytes, as ``benchmarks.real_size --growth`` measured them.

    Attributes:
        weight: resident bytes of a weight, by precision.
        sample: what ControlNet and UNet need for one sample, in float32 maps of the UNet's first level.
        picture: what the decoder needs for one picture, in float32 maps of its last level.
    """

    weight: Mapping[str, float]
    sample: float
    picture: float

    def per_pixel(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
        """Return the bytes of one sample in ControlNet and UNet, and of one picture in the decoder, for each pixel.

        Args:
            configs: configs of ``unet`` and ``vae``, as diffusers has them.
        """
        unet, vae = configs["unet"], configs["vae"]
        level = unet["block_out_channels"][0] / vae_factor(vae) ** 2
        return _FLOAT32 * level * self.sample, _FLOAT32 * vae["block_out_channels"][0] * self.picture
