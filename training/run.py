"""``icexport train probe`` and ``train controlnet``: from checked settings to trained networks on disk."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel

from icexport.errors import UsageError
from icexport.models import loading
from icexport.models.base_model import REFERENCE, find_base
from icexport.models.hub import locate
from icexport.models.probe import InnerControlProbe
from icexport.models.source import controlnet_of
from training.config import ControlNetRun, ModelConfig, ProbeOptions, ProbeRun
from training.data.config import DataConfig
from training.data.loading import open_data
from training.loop.log import underway
from training.loop.processes import make_accelerator
from training.loop.task import Task
from training.loop.trainer import train
from training.tasks.controlnet import ControlNetTask
from training.tasks.frozen import BaseModels, load_base, new_controlnet
from training.tasks.leak import leak_test
from training.tasks.probe import ProbeTask, new_probe
from training.tasks.validation import Validation, first_pictures

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the frozen networks, by the trainer's precision; what is trained stays float32."""

_SD15_TEXT_WIDTH = 768
_LEAK_BATCH = 8

_NO_CONTROLNET = ("", "none", "scratch")


@dataclass(frozen=True)
class _Setup:
    """What both commands begin with."""

    run: ControlNetRun | ProbeRun
    output: Path
    accelerator: Accelerator
    models: BaseModels
    data: DataConfig


def train_controlnet(
    run: ControlNetRun, output: Path, *, resume: bool = True, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train a ControlNet; the result is ``output/controlnet``.

    Args:
        run: all settings.
        output: folder of the result, checkpoints, log and validation pictures.
        resume: whether to go on from the newest checkpoint in ``output``; False refuses an output that has one.
        dry_run: whether to load and check everything, tell what would be trained, and stop.

    Returns:
        What there is to say at the end; None on all processes but the first.

    Raises:
        IcexportError: something does not fit or cannot be read, or training failed.
    """
    setup = _begin(run, output)
    models, data = setup.models, setup.data
    controlnet, origin = _starting_controlnet(run, models)
    if run.controlnet.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
    probe, probe_origin = _aligning_probe(run) if run.loss.beta else (None, "none")
    validation = None
    if run.training.validate_every:
        with underway(logger, "Reading pictures for validation"):
            pictures = first_pictures(_of(data, run.validation.data), models, run.condition, run.validation.count)
        validation = Validation(models, run.condition, pictures, run.validation)
    task = ControlNetTask(
        controlnet,
        models,
        run.loss,
        condition=run.condition,
        probe=probe,
        text_dropout=run.controlnet.text_dropout,
        validation=validation,
    )
    _announce(task, setup, f"ControlNet for {run.model.cond}, from {origin}", f"loss: {_losses(run, probe_origin)}")
    logger.debug("%s", run.preset.notes)
    document = _train(task, setup, resume, dry_run)
    if document is None or dry_run:
        return document
    command = ["build", "--cond", run.model.cond, "--controlnet", document["controlnet"]]
    command += [] if probe is not None and run.model.probe is None else ["--probe", probe_origin]
    return {**document, "next": _command(command, run.model)}


def train_probe(run: ProbeRun, output: Path, *, resume: bool = True, dry_run: bool = False) -> dict[str, Any] | None:
    """Train a probe; the result is ``output/probe``, and ``output/leak.json`` says what it reads.

    Arguments, result and errors are those of `train_controlnet`.
    """
    setup = _begin(run, output)
    models, data = setup.models, setup.data
    folder = None if run.model.controlnet in _NO_CONTROLNET else _part(run.model, "controlnet", run.model.controlnet)
    controlnet = None if folder is None else _load_controlnet(folder, run.model, DTYPES[run.training.precision])
    if run.model.probe is None:
        probe, origin = new_probe(models.unet, run.probe.taps, run.model.cond, **run.probe.sizes), "nothing"
    else:
        probe = loading.load_probe(locate(run.model.probe), torch.float32)
        origin = run.model.probe
    task = ProbeTask(
        probe,
        models,
        condition=run.condition,
        controlnet=controlnet,
        control_share=run.probe.control_share,
        balanced=run.probe.balanced,
        text_dropout=run.probe.text_dropout,
    )
    beside = f"{folder} in {run.probe.control_share:.0%} of the batches" if folder else "none: the plain UNet only"
    what = f"probe of {probe.config.tap_kind!r} taps for {run.model.cond}, from {origin}"
    _announce(task, setup, what, f"ControlNet: {beside}")
    document = _train(task, setup, resume, dry_run)
    if document is None or dry_run:
        return document
    if run.probe.leak_pictures:
        with underway(logger, "Leak test"):
            document["leak"] = _leak(setup, run.probe, controlnet)
    command = ["train", "controlnet", "--cond", run.model.cond, "--probe", document["probe"]]
    if isinstance(data.source, str):
        command += ["--data", data.source]
    return {**document, "next": _command(command, run.model)}


def _begin(run: ControlNetRun | ProbeRun, output: Path) -> _Setup:
    """Load the base model, give the data its size unless they have one, and silence all processes but the first."""
    accelerator = make_accelerator(run.training, output)
    if not accelerator.is_main_process:
        for name in ("icexport", "training"):
            logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(run.training.seed)  # for networks that start from nothing
    with underway(logger, f"Loading the base model {run.model.base}"):
        models, data = load_base(run.model.base, DTYPES[run.training.precision]), run.data
    if run.own_size and models.size is not None:
        data = replace(data, resolution=models.size)
    if wrong := [side for side in data.size if side % models.multiple]:
        raise UsageError(
            f"data.resolution is {data.resolution}: {wrong[0]} is not a multiple of {models.multiple}, which "
            f"{run.model.base} needs."
        )
    return _Setup(run, output, accelerator, models, data)


def _part(model: ModelConfig, part: str, given: str | None) -> Path | None:
    """Return the folder of a ControlNet or probe: as given, or the base model's own for the condition, or None."""
    if given:
        return locate(given)
    return find_base(model.base).beside(f"{part}-{model.cond}")


def _load_controlnet(place: Path, model: ModelConfig, dtype: torch.dtype) -> ControlNetModel:
    return loading.load_controlnet(controlnet_of(place, find_base(model.base)), dtype)


def _aligning_probe(run: ControlNetRun) -> tuple[InnerControlProbe, str]:
    """Return the probe that the alignment reads with, and where it comes from."""
    folder = _part(run.model, "probe", run.model.probe)
    if folder is None:
        raise UsageError(
            f"The alignment loss (beta {run.loss.beta}) needs a probe for {run.model.cond}, and {run.model.base} has "
            "none of its own. Give --probe, train one with icexport train probe, or set loss.beta to 0."
        )
    return loading.load_probe(folder, torch.float32), run.model.probe or str(folder)


def _starting_controlnet(run: ControlNetRun, models: BaseModels) -> tuple[ControlNetModel, str]:
    """Return the ControlNet that is trained, and where it comes from."""
    given = run.model.controlnet
    if given in _NO_CONTROLNET:
        return new_controlnet(models), "a copy of the UNet's encoder"
    folder = _part(run.model, "controlnet", given)
    if folder is None and run.preset.start and models.unet.config["cross_attention_dim"] == _SD15_TEXT_WIDTH:
        given = run.preset.start
        folder = locate(given)
    if folder is None:
        raise UsageError(
            f"{run.model.base} has no ControlNet for {run.model.cond} to start from: give --controlnet DIR, or "
            "--controlnet scratch to start from a copy of the UNet's encoder."
        )
    return _load_controlnet(folder, run.model, torch.float32), given or str(folder)


def _of(data: DataConfig, source: str | None) -> DataConfig:
    """Return the settings for another source; only one that is named can hold pictures that training does not see."""
    return data if source is None else replace(data, source=source)


def _losses(run: ControlNetRun, probe: str) -> str:
    loss, published = run.loss, run.preset.loss
    terms = ["diffusion"]
    if loss.alpha:
        terms.append("{:g} reward (t {}-{})".format(loss.alpha, *loss.reward_range))
    if loss.beta:
        terms.append("{:g} alignment (t {}-{}, read with {})".format(loss.beta, *loss.alignment_range, probe))
    # What was set by hand is nobody's reconstruction.
    names = [
        name for name in vars(loss) if name in run.preset.reconstructed and vars(loss)[name] == vars(published)[name]
    ]
    return " + ".join(terms) + (f"; reconstructed, not known for certain: {', '.join(names)}" if names else "")


def _announce(task: Task, setup: _Setup, what: str, detail: str) -> None:
    """Tell what is about to be trained."""
    config, processes = setup.run.training, setup.accelerator.num_processes
    weights = sum(p.numel() for p in task.parameters() if p.requires_grad)
    height, width = setup.data.size
    parts = f"batch {config.batch_size} x accumulation {config.accumulation} x processes {processes}"
    lines = (
        f"Training a {what} ({weights / 1e6:.3g} M weights)",
        f"base model: {setup.run.model.base}, frozen",
        detail,
        f"data: {setup.data.source}, {height} x {width} px",
        f"updates: {config.steps} of {config.batch_size * config.accumulation * processes} pictures ({parts})",
        f"learning rate: {config.learning_rate:g}; precision: {config.precision}; on {setup.accelerator.device.type}",
    )
    for line in lines:
        logger.info("%s", line)


def _train(task: Task, setup: _Setup, resume: bool, dry_run: bool) -> dict[str, Any] | None:
    """Train ``task``; return what to tell of it, on the first process."""
    run, accelerator, output = setup.run, setup.accelerator, setup.output
    with underway(logger, "Opening the data"):
        batches = open_data(
            setup.data,
            setup.models.tokenize,
            run.training.batch_size,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            seed=run.training.seed,
        )
    if dry_run:
        first_pictures(setup.data, setup.models, run.condition, 1)
        return {"dry_run": "everything fits; nothing was trained"} if accelerator.is_main_process else None
    result = train(task, batches, run.training, output, accelerator=accelerator, resume=resume)
    if not accelerator.is_main_process:
        return None
    _write(output / "settings.json", asdict(replace(run, data=setup.data)))
    return {
        task.name: str(output / task.name),
        "updates": result.step,
        "seconds": round(result.seconds, 1),
        "pictures_per_second": round(result.pictures_per_second, 2),
        "losses": result.losses,
        "faults": batches.counts.summary(),
    }


def _leak(setup: _Setup, options: ProbeOptions, controlnet: ControlNetModel | None) -> list[dict[str, float]]:
    """Run the leak test of the finished probe, also into ``leak.json``; no rows if it cannot be made."""
    models, condition = setup.models, setup.run.condition
    data = _of(setup.data, options.leak_data)
    pictures = first_pictures(data, models, condition, options.leak_pictures)
    count = len(pictures["ids"]) // 2 * 2
    if count == 0:
        logger.warning("No leak test: it exchanges control maps, and %s has one picture only.", data.source)
        return []
    parts = (slice(start, min(start + _LEAK_BATCH, count)) for start in range(0, count, _LEAK_BATCH))
    batches = [{name: value[part] for name, value in pictures.items()} for part in parts]
    probe = loading.load_probe(setup.output / ProbeTask.name, torch.float32).to(models.unet.device)
    with models.autocast():
        rows = leak_test(probe, models, controlnet, batches, condition=condition, seed=setup.run.training.seed)
    _write(setup.output / "leak.json", {"pictures": count, "source": data.source, "rows": rows})
    return rows


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def _command(arguments: list[str], model: ModelConfig) -> str:
    """Return a command line of icexport with the base model that this one had."""
    base = [] if model.base == REFERENCE else ["--model", model.base]
    return shlex.join(["icexport", *arguments, *base])
