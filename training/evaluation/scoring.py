"""From pictures in files to numbers with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from icexport.conditions.base import Condition
from icexport.errors import UsageError
from icexport.host.pixels import to_pixels
from icexport.progress import Progress
from training.evaluation.features import ClipScore, FeatureExtractor, frechet_distance, kernel_distance
from training.evaluation.generate import Item, open_picture, picture_path
from training.evaluation.intervals import bootstrap_mean, paired_bootstrap
from training.evaluation.metrics import Metric, compare, metrics_of, read, unavailable

CLIP = "clip_score"
CLIP_METRIC = Metric("CLIP score", "0 to 100")


@dataclass(frozen=True)
class Judged:
    """What one set of pictures got: N conditions, G pictures of each, the pictures of a condition side by side.

    Attributes:
        scores: scores ``[N*G]`` by metric.
        chance: scores ``[N*G]`` by metric, against the maps of other conditions; empty for a single condition.
        features: features ``[N,G,D]`` by extractor.
    """

    scores: dict[str, Tensor]
    chance: dict[str, Tensor]
    features: dict[str, Tensor]


def judge(
    items: Sequence[Item],
    groups: int,
    folder: Path,
    condition: Condition,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    clip: ClipScore | None = None,
    batch_size: int = 4,
    device: str = "cpu",
    progress: Progress,
) -> Judged:
    """Read the pictures in ``folder`` and score each against its map, and against the map of another condition.

    The other condition is the one half the set further on: neighbours are often of one kind.

    Raises:
        UsageError: pictures are missing, damaged, or of another size than the control maps.
    """
    check_pictures(items, groups, folder)
    jobs = [(i, group) for i in range(len(items)) for group in range(groups)]
    scores: dict[str, list[Tensor]] = {}
    chance: dict[str, list[Tensor]] = {}
    features: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    step = f"score {folder.name}"
    for start in range(0, len(jobs), batch_size):
        progress(step, start, len(jobs))
        batch = jobs[start : start + batch_size]
        images = [open_picture(picture_path(folder, items[i].id, group)) for i, group in batch]
        controls = _load(items[i].control for i, _ in batch)
        _check_sizes(images, controls, folder, [items[i] for i, _ in batch])
        readings = read(condition, torch.cat([to_pixels(image) for image in images]).to(device))
        _add(scores, compare(condition, readings, controls))
        if len(items) > 1:
            others = _load(items[(i + len(items) // 2) % len(items)].control for i, _ in batch)
            _add(chance, compare(condition, readings, others))
        if clip:
            _add(scores, {CLIP: clip(images, [items[i].caption for i, _ in batch])})
        for extractor in extractors:
            features[extractor.name].append(extractor(images))
    return Judged(
        {name: torch.cat(parts) for name, parts in scores.items()},
        {name: torch.cat(parts) for name, parts in chance.items()},
        {name: torch.cat(parts).unflatten(0, (len(items), groups)) for name, parts in features.items()},
    )


def summarise(
    condition: Condition, items: Sequence[Item], groups: int, judged: Mapping[str, Judged], seed: int
) -> dict[str, Any]:
    """Return the mean and 95 % interval of every metric in every set of pictures, or why there is none.

    Args:
        condition: what was judged.
        items: the conditions.
        groups: number of pictures of each condition.
        judged: what ``control`` got and, where it was drawn, ``no_control``.
        seed: seed of the resampling.
    """
    ids = [item.id for item in items for _ in range(groups)]
    with Image.open(items[0].control) as control:
        width, height = control.size
    reasons = {**unavailable(condition, height, width), CLIP: "No CLIP model was given (--clip-model)."}
    with_control, without = judged["control"], judged.get("no_control")
    found = {}
    for name, metric in {**metrics_of(condition), CLIP: CLIP_METRIC}.items():
        row: dict[str, Any] = {**vars(metric), "control": None}
        if name in with_control.scores:
            row["control"] = _interval(bootstrap_mean(with_control.scores[name], ids, seed))
            if without:
                row["no_control"] = _interval(bootstrap_mean(without.scores[name], ids, seed))
                gain = paired_bootstrap(with_control.scores[name], without.scores[name], ids, seed=seed)
                row["control_minus_no_control"] = _interval(gain)
            if name in with_control.chance:
                row["chance"] = _interval(bootstrap_mean(with_control.chance[name], ids, seed))
        else:
            row["reason"] = reasons[name]
        found[name] = row
    return found


def statistics(
    extractors: Sequence[FeatureExtractor], real: Mapping[str, Tensor], judged: Mapping[str, Judged]
) -> dict[str, Any]:
    """Compute every set's distances from the real pictures: each group on its own, then the mean, as in the paper.

    ``between_real_halves`` is the distance of every other real picture from the rest, as a scale: what equal
    distributions give with half of the pictures.
    """
    found: dict[str, Any] = {}
    for extractor in extractors:
        pictures = real[extractor.name]
        row: dict[str, Any] = {"title": extractor.title, "kernel_title": extractor.kernel_title}
        row |= {"features": pictures.shape[1], "pictures": len(pictures)}
        if len(pictures) < 4:
            found[extractor.name] = {**row, "reason": f"{len(pictures)} real pictures are too few; 4 is the least."}
            continue
        row["between_real_halves"] = _distances(pictures[::2], pictures[1::2])
        for name, one in judged.items():
            groups = [_distances(pictures, group) for group in one.features[extractor.name].unbind(1)]
            row[name] = {key: sum(group[key] for group in groups) / len(groups) for key in groups[0]}
        found[extractor.name] = row
    return found


def check_pictures(items: Sequence[Item], groups: int, folder: Path) -> None:
    """Check that every picture is there.

    Raises:
        UsageError: pictures are missing; the first ones are named.
    """
    paths = [picture_path(folder, item.id, group) for item in items for group in range(groups)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UsageError(
            f"{folder} lacks {len(missing)} of {len(paths)} pictures, for instance {', '.join(missing[:3])}. They are "
            "named <id>-<group>.png; --images-per-condition and --max-samples say which are expected."
        )


def _check_sizes(images: Sequence[Image.Image], controls: Tensor, folder: Path, items: Sequence[Item]) -> None:
    height, width = controls.shape[-2:]
    for image, item in zip(images, items, strict=True):
        if image.size != (width, height):
            raise UsageError(
                f"The pictures of {item.id!r} in {folder} have {image.width} x {image.height} px, the control maps "
                f"{width} x {height}. Give the pictures' size with --height and --width."
            )


def _load(paths: Any) -> Tensor:
    return torch.cat([to_pixels(open_picture(path)) for path in paths])


def _add(found: dict[str, list[Tensor]], scores: Mapping[str, Tensor]) -> None:
    for name, values in scores.items():
        found.setdefault(name, []).append(values.cpu())


def _interval(found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), found, strict=True))


def _distances(real: Tensor, drawn: Tensor) -> dict[str, float]:
    return {"frechet": frechet_distance(real, drawn), "kernel": kernel_distance(real, drawn)}
