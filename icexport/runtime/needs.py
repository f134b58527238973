"""How much memory drawing from a bundle will take, known before any of it is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.base import as_device
from engines.errors import OutOfMemoryError
from icexport.backends import table
from icexport.bundle.manifest import Manifest
from icexport.graphs.profile import Profile
from icexport.host.memory import available
from icexport.runtime.phases import PHASES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """What a bundle needs on the CPU beside the libraries, in bytes.

    Attributes:
        phases: the open engines of each phase of a picture.
        sample: one sample in ControlNet and UNet, for each pixel of the picture.
        picture: one picture in the decoder, for each of its pixels.
    """

    phases: Mapping[str, float]
    sample: float
    picture: float

    @classmethod
    def of(cls, manifest: Manifest, backend: str, device: str | torch.device) -> Needs | None:
        """Return the needs of a bundle; None: they are not known for this backend, device or family of models."""
        footprint = table.get(backend).footprint
        if footprint is None or as_device(device).type != "cpu" or not manifest.graphs.keys() <= PHASES.keys():
            return None
        phases = dict.fromkeys(PHASES.values(), 0.0)
        for name, graph in manifest.graphs.items():
            phases[PHASES[name]] += footprint.weight[manifest.dtype] * sum(graph.dtypes.values())
        return cls(phases, *footprint.per_pixel(manifest.configs))

    def needed(
        self, height: int, width: int, pictures: int, *, low_memory: bool = False, opened: bool = False
    ) -> float:
        """Return the bytes that a call needs beside what is open already, with guidance.

        Args:
            height: height in pixels.
            width: width in pixels.
            pictures: number of pictures in one call.
            low_memory: whether each phase opens its own engines, and closes those of the others.
            opened: whether all engines are open already.
        """
        pixels = height * width * pictures
        beside = {"draw": 2 * self.sample * pixels, "decode": self.picture * pixels}
        if low_memory:
            return max(weights + beside.get(phase, 0.0) for phase, weights in self.phases.items())
        return max(beside.values()) + (0.0 if opened else sum(self.phases.values()))

    def choose_low_memory(self, profile: Profile, wanted: bool | None) -> bool:
        """Return whether engines are to be open only while they are needed.

        Args:
            profile: sizes of the bundle.
            wanted: what the user says; None: nothing, so that they are where a usual picture does not fit otherwise.

        Raises:
            OutOfMemoryError: not even one picture of the smallest size fits.
        """
        low = self._is_short(profile) if wanted is None else wanted
        self.check(profile.height.min, profile.width.min, 1, low_memory=low)
        return low

    def _is_short(self, profile: Profile) -> bool:
        needed, free = self.needed(profile.height.opt, profile.width.opt, 1), available()
        if needed > free:
            logger.warning(
                "A picture takes about %.1f GB of memory, and %.1f GB are free: each engine is open only while it is "
                "needed, as with low_memory=True. That takes longer.",
                needed / 1e9,
                free / 1e9,
            )
        return needed > free

    def check(self, height: int, width: int, pictures: int, *, low_memory: bool = False, opened: bool = False) -> None:
        """Refuse what does not fit into the memory that is free; arguments are those of ``needed``.

        Raises:
            OutOfMemoryError: it does not fit.
        """
        needed, free = self.needed(height, width, pictures, low_memory=low_memory, opened=opened), available()
        if needed > free:
            what = "one picture" if pictures == 1 else f"{pictures} pictures at a time"
            raise OutOfMemoryError(
                f"Drawing {what}, {height} x {width} px, takes about {needed / 1e9:.1f} GB more memory, and "
                f"{free / 1e9:.1f} GB are free. With preflight=False or --no-preflight it is tried all the same"
            )
