"""Control fidelity of finished pictures, one number a picture: right metrics, and those of the published protocol.

The published protocol is that of ControlNet++, which InnerControl uses, too. Where it is flawed, its number has a name
that ends in ``_legacy`` and stands beside a right one. Shape letters: N pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from icexport.conditions.base import Condition
from icexport.conditions.canny import Canny
from icexport.conditions.depth import Depth, predict
from icexport.errors import UsageError
from icexport.fidelity.metrics import EPS, default_tolerance_px, depth_rmse, edge_f1, min_max, psnr, ssim
from icexport.host.pictures import round_to_8bit

LEGACY_CANNY = (0.1, 0.2)
"""Thresholds of the published canny evaluation, for a gradient magnitude of pixels in [0,1]."""

MAX_PSNR = 100.0
"""What the published protocol writes for equal maps, in dB."""

MS_SSIM_SIDE = 176
"""Multi-scale SSIM halves its maps four times and needs 11 px after that: shortest side, in pixels."""


@dataclass(frozen=True)
class Metric:
    """What one number means.

    Attributes:
        title: name of the metric, for people.
        unit: unit of the number.
        higher_is_better: whether more is better.
        legacy: whether it is part of the published protocol only, with its flaws.
    """

    title: str
    unit: str = "ratio"
    higher_is_better: bool = True
    legacy: bool = False


_SSIM = {"ssim": Metric("SSIM"), "ms_ssim": Metric("multi-scale SSIM")}
_LEVELS = "8-bit levels"
METRICS: dict[str, dict[str, Metric]] = {
    "canny": {
        "edge_f1": Metric("edge F1 with tolerance"),
        "edge_f1_exact": Metric("edge F1, exact pixels"),
        "edge_f1_legacy": Metric("edge F1, exact pixels, published thresholds", legacy=True),
        "psnr_legacy": Metric("PSNR of the edges, at most 100", "dB", legacy=True),
    },
    "hed": _SSIM,
    "lineart": {
        **_SSIM,
        "ssim_legacy": Metric("SSIM, inverted with the published wrap-around", legacy=True),
        "ms_ssim_legacy": Metric("multi-scale SSIM, inverted with the published wrap-around", legacy=True),
    },
    "depth": {
        "depth_rmse": Metric("RMSE of min-max normalised depth", _LEVELS, higher_is_better=False),
        "depth_rmse_affine": Metric("RMSE after the best scale and shift", _LEVELS, higher_is_better=False),
        "depth_rmse_legacy": Metric(
            "RMSE, prediction / maximum against min-max", _LEVELS, higher_is_better=False, legacy=True
        ),
    },
}
"""By condition; the first metric of each is the one that `Condition.score` gives."""


def metrics_of(condition: Condition) -> dict[str, Metric]:
    """Return the metrics of a condition by name; of one that is not in `METRICS` its own score alone."""
    own = {"score": Metric(condition.metric, condition.unit, condition.higher_is_better)}
    return METRICS.get(condition.name, own)


@dataclass(frozen=True)
class Readings:
    """What an extractor finds in pictures.

    Attributes:
        maps: maps ``[N,1,H,W]`` in [0,1], multiples of 1/255.
        legacy: maps ``[N,1,H,W]`` that the published protocol would compare instead, or None.
    """

    maps: Tensor
    legacy: Tensor | None


def score_pictures(condition: Condition, pictures: Tensor, controls: Tensor) -> dict[str, Tensor]:
    """Return every metric of the condition that can be computed here; `unavailable` says why others cannot.

    Args:
        condition: reads the pictures, with its options.
        pictures: pictures ``[N,3,H,W]`` in [0,1]; rounded to 8 bits first, as saved files are.
        controls: control map of each picture, ``[N,3,H,W]`` in [0,1].

    Returns:
        ``[N]`` float32 for each name in ``metrics_of(condition)``.

    Raises:
        ConditionError: the condition lacks weights.
        UsageError: the shapes differ.
    """
    return compare(condition, read(condition, pictures), controls)


@torch.no_grad()
def read(condition: Condition, pictures: Tensor) -> Readings:
    """Read the control back from pictures ``[N,3,H,W]`` in [0,1]. Arguments and errors as `score_pictures`."""
    pictures = round_to_8bit(pictures.float())
    if isinstance(condition, Canny):
        condition = condition.with_options(soft=False)
    maps = round_to_8bit(condition.extract_batch(pictures)[:, :1])
    return Readings(maps, _legacy_reading(condition, pictures, maps))


@torch.no_grad()
def compare(condition: Condition, readings: Readings, controls: Tensor) -> dict[str, Tensor]:
    """Judge readings against control maps ``[N,3,H,W]`` in [0,1]; `score_pictures` without the reading."""
    target = controls.to(readings.maps.device).float().mean(1, keepdim=True)
    if target.shape != readings.maps.shape:
        raise UsageError(
            f"Control maps of shape {tuple(controls.shape)} do not belong to pictures read as "
            f"{tuple(readings.maps.shape)}: number, height and width must be equal."
        )
    found = _COMPARE.get(condition.name, _compare_as_it_does)(condition, readings, target)
    return {name: found[name].float() for name in metrics_of(condition) if name in found}


def unavailable(condition: Condition, height: int, width: int) -> dict[str, str]:
    """Return the metrics of the condition that cannot be computed for pictures of this size, here, and why."""
    reasons: dict[str, str] = {}
    if min(height, width) < MS_SSIM_SIDE:
        reason = f"Five scales need sides of {MS_SSIM_SIDE} px or more; the pictures have {width} x {height}."
        reasons |= dict.fromkeys(("ms_ssim", "ms_ssim_legacy"), reason)
    elif not find_spec("torchmetrics"):
        reasons |= dict.fromkeys(("ms_ssim", "ms_ssim_legacy"), "torchmetrics is not installed.")
    if not find_spec("kornia"):
        reasons |= dict.fromkeys(("edge_f1_legacy", "psnr_legacy"), "kornia is not installed.")
    if not isinstance(condition, Depth):
        reasons["depth_rmse_legacy"] = "This extractor gives normalised depth only."
    return {name: reason for name, reason in reasons.items() if name in metrics_of(condition)}


def exact_f1(predicted: Tensor, target: Tensor) -> Tensor:
    """Compute F1 of edge pixels at exactly the same place, 0 for two blank maps, as torchmetrics' ``BinaryF1Score``.

    Args:
        predicted: maps ``[N,1,H,W]``, edges above 0.5.
        target: maps of the same shape.

    Returns:
        ``[N]`` in [0,1]. (The published code pools the four pictures of a condition before it divides.)
    """
    predicted, target = (maps.gt(0.5).flatten(1) for maps in (predicted, target))
    hits, both = (predicted & target).sum(1), predicted.sum(1) + target.sum(1)
    return 2 * hits / both.clamp(min=1)


def ms_ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the multi-scale SSIM ``[N]`` of maps ``[N,1,H,W]`` in [0,1] with sides of `MS_SSIM_SIDE` px or more.

    Source: Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment", 2003.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    scores: Tensor = measure(predicted, target, data_range=1.0, reduction="none")
    return scores.view(-1)


def affine_depth_rmse(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the RMSE of relative depth after the scale and shift that make it smallest, for each picture on its own.

    Args:
        predicted: maps ``[N,1,H,W]`` of any scale and offset; a flat map is compared by its shift alone.
        target: maps of the same shape, stretched to 0-255 by their own minimum and maximum first.

    Returns:
        ``[N]`` 8-bit levels. At most the standard deviation of the target.

    Source: Ranftl et al., "Towards robust monocular depth estimation", 2020, equations 2 and 3.
    """
    x, y = predicted.double().flatten(1), 255 * min_max(target.double()).flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    scale = (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp(min=EPS**2)
    return (scale * x - y).square().mean(1).sqrt()


def legacy_depth_rmse(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the published RMSE: the prediction divided by its maximum, the label stretched by minimum and maximum.

    Args:
        predicted: maps ``[N,1,H,W]`` of whole levels, as `legacy_depth` gives them.
        target: maps of the same shape and any range.

    Returns:
        ``[N]`` 8-bit levels.
    """
    label = _cut(255 * min_max(target.float()))
    return (predicted - label).square().mean((1, 2, 3)).sqrt()


def legacy_depth(depth: Tensor) -> Tensor:
    """Divide depth ``[N,1,H,W]`` by its maximum, in whole 8-bit levels. Negative depth, which DPT lacks, is 0."""
    depth = depth.clamp(min=0)
    return _cut(255 * depth / depth.amax((1, 2, 3), keepdim=True).clamp(min=EPS))


def _cut(levels: Tensor) -> Tensor:
    """Return what a cast to uint8 leaves; a whole level that float32 puts a hair lower is still that level."""
    return (levels + 1e-3).floor()


def wrapped_lineart(maps: Tensor) -> Tensor:
    """Return white lines on black ``[N,1,H,W]`` as the published code gets them from black lines on white.

    It subtracts 8-bit levels from 1, not from 255. They wrap around: every level is 2 too high, except for the
    strongest lines, whose 254 and 255 become 0 and 1.
    """
    return ((255 * maps).round() + 2) % 256 / 255


def _legacy_reading(condition: Condition, pictures: Tensor, maps: Tensor) -> Tensor | None:
    if condition.name == "canny" and find_spec("kornia"):
        from kornia.filters import canny

        return canny(pictures, *LEGACY_CANNY)[1]
    if condition.name == "lineart":
        return wrapped_lineart(maps)
    if isinstance(condition, Depth):
        depth, metric = predict(pictures, condition.model)
        return legacy_depth(F.interpolate(-depth if metric else depth, pictures.shape[-2:], mode="bicubic"))
    return None


def _compare_edges(condition: Condition, readings: Readings, target: Tensor) -> dict[str, Tensor]:
    tolerance = getattr(condition, "tolerance_px", None)
    if tolerance is None:
        tolerance = default_tolerance_px(*target.shape[-2:])
    found = {"edge_f1": edge_f1(readings.maps, target, tolerance), "edge_f1_exact": edge_f1(readings.maps, target, 0)}
    if readings.legacy is not None:
        found["edge_f1_legacy"] = exact_f1(readings.legacy, target)
        found["psnr_legacy"] = psnr(readings.legacy, target).clamp(max=MAX_PSNR)
    return found


def _compare_lines(_condition: Condition, readings: Readings, target: Tensor) -> dict[str, Tensor]:
    multi_scale = min(target.shape[-2:]) >= MS_SSIM_SIDE and find_spec("torchmetrics")
    found = {}
    for suffix, maps in (("", readings.maps), ("_legacy", readings.legacy)):
        if maps is not None:
            found[f"ssim{suffix}"] = ssim(maps, target)
            if multi_scale:
                found[f"ms_ssim{suffix}"] = ms_ssim(maps, target)
    return found


def _compare_depth(_condition: Condition, readings: Readings, target: Tensor) -> dict[str, Tensor]:
    found = {
        "depth_rmse": depth_rmse(readings.maps, target),
        "depth_rmse_affine": affine_depth_rmse(readings.maps, target),
    }
    if readings.legacy is not None:
        found["depth_rmse_legacy"] = legacy_depth_rmse(readings.legacy, target)
    return found


def _compare_as_it_does(condition: Condition, readings: Readings, target: Tensor) -> dict[str, Tensor]:
    return {"score": condition._compare(readings.maps, target)}


_COMPARE: dict[str, Callable[[Condition, Readings, Tensor], dict[str, Tensor]]] = {
    "canny": _compare_edges,
    "hed": _compare_lines,
    "lineart": _compare_lines,
    "depth": _compare_depth,
}
