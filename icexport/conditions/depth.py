"""Relative depth by the depth models of transformers (DPT, Depth Anything), from a folder or the hub."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from icexport.conditions.base import Condition
from icexport.errors import ConditionError
from icexport.fidelity.metrics import depth_rmse, min_max
from icexport.models.base_model import REFERENCE
from icexport.models.probe import Normaliser
from icexport.reference import reference_path

DEFAULT_MODEL = "Intel/dpt-hybrid-midas"
MODEL_TYPES = ("dpt", "depth_anything")


@dataclass(frozen=True)
class Depth(Condition):
    """Depth, stretched to [0,1] per picture by its minimum and maximum. Differentiable.

    Attributes:
        model: folder or hub id of a DPT or Depth Anything model. None is Intel/dpt-hybrid-midas if it is in the local
            cache; naming an id permits the download. ``reference`` is the one of the embedded reference
            model, which knows that model's scenes and nothing else.
    """

    name: ClassVar[str] = "depth"
    polarity: ClassVar[str] = "near is white, far is black"
    metric: ClassVar[str] = "RMSE of min-max normalised depth"
    unit: ClassVar[str] = "8-bit levels"
    higher_is_better: ClassVar[bool] = False
    probe_normaliser: ClassVar[Normaliser] = "max"

    model: str | Path | None = None

    def for_model(self, model: str) -> Depth:
        """See ``Condition.for_model``: the reference model has a depth network of its own."""
        return replace(self, model=REFERENCE) if model == REFERENCE else self

    def _extract(self, pixels: Tensor) -> Tensor:
        depth, metric = predict(pixels, self.model)
        return min_max(F.interpolate(-depth if metric else depth, pixels.shape[-2:], mode="bicubic"))

    def _compare(self, readings: Tensor, control_maps: Tensor) -> Tensor:
        return depth_rmse(readings, control_maps)


def predict(pixels: Tensor, model: str | Path | None) -> tuple[Tensor, bool]:
    """Return what the depth network says, before anything is normalised. Differentiable.

    Args:
        pixels: ``[B,3,H,W]`` float32 in [0,1].
        model: as in `Depth`.

    Returns:
        ``[B,1,h,w]`` at the network's own size, and whether it is metric: distance, so that near is small. Other
        networks give inverse depth on a scale of their own.

    Raises:
        ConditionError: if the network cannot be loaded.
    """
    network, processor = _load(None if model is None else str(model), pixels.device)
    depth: Tensor = network(_model_input(pixels, processor)).predicted_depth[:, None]
    return depth, getattr(network.config, "depth_estimation_type", "relative") == "metric"


def _model_input(pixels: Tensor, processor: Any) -> Tensor:
    """Resize and normalise as the model's image processor does, on the device and with gradients."""
    resized = F.interpolate(pixels, _input_size(pixels, processor), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (resized - mean) / std


def _input_size(pixels: Tensor, processor: Any) -> list[int]:
    """Return the height and width that the model wants for these pixels."""
    sides = pixels.shape[-2:]
    scales = [processor.size[name] / side for name, side in zip(("height", "width"), sides, strict=True)]
    if processor.keep_aspect_ratio:
        scales = [min(scales, key=lambda scale: abs(1 - scale))] * 2
    multiple = processor.ensure_multiple_of
    return [max(1, round(scale * side / multiple)) * multiple for scale, side in zip(scales, sides, strict=True)]


@functools.lru_cache(maxsize=2)
def _load(name: str | None, device: torch.device) -> tuple[Any, Any]:
    """Return the depth model, frozen and on ``device``, and its image processor.

    Raises:
        ConditionError: if either cannot be loaded, or the model is of an unknown type.
    """
    path = str(reference_path() / "depth-estimator") if name == REFERENCE else name or DEFAULT_MODEL
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        processor = AutoImageProcessor.from_pretrained(path, local_files_only=name is None)  # type: ignore[no-untyped-call]
        model = AutoModelForDepthEstimation.from_pretrained(path, local_files_only=name is None)
    except (OSError, ValueError, ImportError) as error:
        raise ConditionError(
            f"The depth model {path!r} cannot be loaded ({' '.join(str(error).split())}). Pass model=FOLDER or "
            f"model=HUB_ID; without a network, run `hf download {DEFAULT_MODEL}` elsewhere and pass that folder."
        ) from error
    if model.config.model_type not in MODEL_TYPES:
        raise ConditionError(
            f"The depth model {path!r} is of type {model.config.model_type!r}; expected {' or '.join(MODEL_TYPES)}."
        )
    return model.to(device).eval().requires_grad_(False), processor
