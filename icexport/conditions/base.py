"""The interface of a condition, and what all conditions share: options, checks, 8-bit pictures."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from icexport.errors import ConditionError, UsageError
from icexport.host.pictures import round_to_8bit, to_image
from icexport.host.pixels import as_pictures, to_pixels
from icexport.models.probe import Normaliser

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Condition(ABC):
    """What a control map shows, and how to read it from pictures.

    The fields of a subclass are its options: bound by `icexport.conditions.get` or `with_options`, or given to a call.
    """

    name: ClassVar[str]
    polarity: ClassVar[str]
    """What is bright in a control map."""
    metric: ClassVar[str]
    """What `score` measures."""
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    probe_normaliser: ClassVar[Normaliser] = "identity"
    """What is applied to the reading of a probe that we train: our control maps are white on black by definition."""

    def describe(self) -> dict[str, Any]:
        """Return what a bundle's manifest records of the condition."""
        return {
            "name": self.name,
            "value_range": self.value_range,
            "polarity": self.polarity,
            "metric": self.metric,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
        }

    def for_model(self, model: str) -> Self:
        """Return the condition as it is used with a base model, which may have extractors of its own.

        Args:
            model: base model as a user names it: ``reference``, a folder or a Hub id.
        """
        return self

    def with_options(self, **options: Any) -> Self:
        """Return the same condition with some options changed.

        Raises:
            ConditionError: if an option is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(options) - set(known)):
            raise ConditionError(
                f"{self.name} has no option {', '.join(map(repr, unknown))}. Its options: {', '.join(known)}."
            )
        return dataclasses.replace(self, **options)

    def extract(self, image: Any, **options: Any) -> Image.Image:
        """Read the control map from a picture, on the CPU.

        Args:
            image: one picture: PIL of any mode, a NumPy array or a torch tensor, see ``icexport.host.pixels``;
                transparent parts count as white, and what has more than 8 bits is rounded.
            **options: override this condition's options.

        Returns:
            RGB picture of the same size.

        Raises:
            ConditionError: if an option is not valid, or weights are missing.
            UsageError: it is no picture, several ones, or its range is not known.
        """
        found = as_pictures(image, transparent="white")
        if len(found) != 1:
            raise UsageError(f"image holds {len(found)} pictures: extract them one by one, or use extract_batch.")
        pixels = round_to_8bit(found) if isinstance(found, Tensor) else to_pixels(found[0])
        with torch.no_grad():
            return to_image(self.with_options(**options)._extract_8bit(pixels)[0])

    def extract_batch(self, pixels: Tensor, **options: Any) -> Tensor:
        """Read control maps from a batch, on its device. The class says whether gradients reach ``pixels``.

        Args:
            pixels: ``[B,3,H,W]`` in [0,1], any float dtype.
            **options: override this condition's options.

        Returns:
            ``[B,3,H,W]`` float32 in [0,1], three equal channels.

        Raises:
            ConditionError: if an option or the shape is not valid, or weights are missing.
        """
        return self.with_options(**options)._extract(_checked(pixels, "pixels")).repeat(1, 3, 1, 1)

    @torch.no_grad()
    def score(self, pictures: Tensor, control_maps: Tensor, **options: Any) -> Tensor:
        """Return how well finished pictures follow their control maps.

        Pictures are rounded to 8 bits first and read with the same extractor as `extract`, so that the score is what
        anyone recomputes from the saved files.

        Args:
            pictures: ``[B,3,H,W]`` in [0,1].
            control_maps: ``[B,3,H,W]`` in [0,1].
            **options: override this condition's options.

        Returns:
            ``[B]`` float32 on the device of ``pictures``, in `unit`; `higher_is_better` says which way.

        Raises:
            ConditionError: if an option or a shape is not valid, or weights are missing.
        """
        pictures, control_maps = _checked(pictures, "pictures"), _checked(control_maps, "control_maps")
        if pictures.shape != control_maps.shape:
            raise ConditionError(
                f"Pictures of shape {tuple(pictures.shape)} cannot be scored against control maps of shape "
                f"{tuple(control_maps.shape)}; expected equal shapes."
            )
        condition = self.with_options(**options)
        readings = round_to_8bit(condition._extract_8bit(round_to_8bit(pictures)))
        return condition._compare(readings, control_maps.to(pictures.device).mean(1, keepdim=True))

    @abstractmethod
    def _extract(self, pixels: Tensor) -> Tensor:
        """Return control maps ``[B,1,H,W]`` of ``pixels`` ``[B,3,H,W]`` float32."""

    def _extract_8bit(self, pixels: Tensor) -> Tensor:
        """Do as `_extract`, for pixels that are multiples of 1/255, without gradients."""
        return self._extract(pixels)

    @abstractmethod
    def _compare(self, readings: Tensor, control_maps: Tensor) -> Tensor:
        """Return the score ``[B]`` of readings ``[B,1,H,W]`` against control maps of the same shape."""


def _checked(pixels: Tensor, name: str) -> Tensor:
    """Return ``pixels`` as float32, once its shape and type are right."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ConditionError(
            f"{name} is {pixels.dtype} of shape {tuple(pixels.shape)}; expected floats in [0,1] of shape [B,3,H,W]."
        )
    return pixels.float()
