"""The training loop: every ControlNet, probe and stage of the reference model is trained by ``train``.

    task = ControlNetTask(...)                       # what is trained, and its losses
    train(task, batches, TrainerConfig(steps=10_000), Path("runs/canny"))

It runs as it is on one device, and under ``accelerate launch`` or ``torchrun`` on many, with DDP or FSDP 2. A run that
is interrupted and started again goes on from its last checkpoint and, on the same machine with as many processes,
computes the very numbers that it would have computed without the interruption:

    output/log.jsonl                 means of the losses since the row before
    output/checkpoints/step-…/       see training/loop/checkpoint.py
    output/validation/step-…/        pictures that the task draws; numbers in output/validation.jsonl
    output/<task>/                   the result: averaged weights (without averages: the live ones)
    output/<task>-live/              with averages: the live weights
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from icexport.errors import UsageError
from icexport.host.files import replacing
from training.loop.checkpoint import Checkpoints, gather_model, gather_optimizer, restore
from training.loop.config import TrainerConfig
from training.loop.ema import Ema
from training.loop.log import TrainingLog
from training.loop.meter import GRADIENT_NORM, Meter
from training.loop.optimizers import new_optimizer
from training.loop.processes import check_accelerator, interruptible, make_accelerator, on_main
from training.loop.task import Batch, Batches, Task
from training.seeds import mix_seed

__all__ = ["Batch", "Batches", "Task", "TrainResult", "TrainerConfig", "make_accelerator", "train"]

logger = logging.getLogger(__name__)

_MAY_CHANGE = {"steps", "checkpoint_every", "keep_checkpoints", "log_every", "validate_every", "trackers"}


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        step: number of updates in all, those of earlier runs that it resumed included.
        seconds: time of this run.
        pictures_per_second: speed of this run's training alone, over all processes; 0 if there was nothing left to do.
        losses: the last row of the log: means over its interval.
        output: the run's folder.
    """

    step: int
    seconds: float
    pictures_per_second: float
    losses: dict[str, float]
    output: Path


def train(
    task: Task,
    batches: Batches,
    config: TrainerConfig,
    output: Path,
    *,
    accelerator: Accelerator | None = None,
    resume: bool = True,
) -> TrainResult:
    """Train ``task`` to the end, from the newest checkpoint in ``output`` if there is one.

    Args:
        task: holds the live weights afterwards (under FSDP: this process's shards).
        batches: this process's share of the data.
        config: settings of the training, see `TrainerConfig`.
        output: folder of everything that is written; all processes must see the same one.
        accelerator: accelerator from ``make_accelerator``, which is called if None.
        resume: whether to go on from a checkpoint; False refuses an ``output`` that has checkpoints.

    Raises:
        UsageError: settings cannot be used or differ from those of the checkpoint, or ``output`` is in use.
        CheckpointError: the newest checkpoint is damaged.
        NonFiniteError: loss or gradient is NaN or infinite; step, pictures and last good checkpoint are named.
        IcexportError: the disk is full. The last checkpoint stays valid.
        KeyboardInterrupt: Ctrl-C or SIGTERM arrived. What came after the last checkpoint is lost, nothing else.
    """
    started = time.perf_counter()
    accelerator = accelerator or make_accelerator(config, output)
    check_accelerator(accelerator, config)
    run = _Run(task, batches, config, output, accelerator, resume)
    try:
        with interruptible(), run.log:
            for step in range(run.first, config.steps):
                run.update(step)
                run.report(step + 1)
            run.export()
    finally:
        accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
        accelerator.free_memory()
    speed = run.pictures / run.seconds if run.seconds else 0.0
    return TrainResult(max(run.first, config.steps), time.perf_counter() - started, speed, run.losses, output)


class _Run:
    """State and steps of one call of ``train``."""

    def __init__(
        self, task: Task, batches: Batches, config: TrainerConfig, output: Path, accelerator: Accelerator, resume: bool
    ) -> None:
        self._task, self._batches, self._config = task, batches, config
        self._output, self._accelerator = output, accelerator
        self._checkpoints = Checkpoints(output / "checkpoints", config.keep_checkpoints)
        trained = _trained_parameters(task)
        self._check_output(resume)
        # Before `prepare`, since a sharded module cannot be copied. Only the first process uses it.
        self._copy = task.copy() if accelerator.is_main_process else task
        optimizer = new_optimizer(
            config.optimizer,
            trained,
            accelerator.device,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        accelerator.gradient_accumulation_steps, accelerator.step = config.accumulation, 0
        self.model, self._optimizer = accelerator.prepare(task.train(), optimizer)
        self._ema = (
            Ema(accelerator.unwrap_model(self.model), config.ema_decay) if config.ema_decay is not None else None
        )
        self._settings = _settings(config, task, accelerator.num_processes)
        state = self._resume()
        self.first: int = state.get("step", 0)
        self.losses: dict[str, float] = state.get("losses", {})
        self.seconds, self.pictures = 0.0, 0
        self._meter = Meter(accelerator, state.get("totals"))
        self.log = TrainingLog(accelerator, output, task.name, self.first, config.steps, self._settings)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._generator = torch.Generator()
        self._data = iter(batches)
        if self.first and isinstance(self.model, DistributedDataParallel):
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Bring DDP to where it is after its first update.

        It regroups gradients in the order in which they were ready in the first backward pass, and the order in which
        three or more processes are summed depends on the grouping. So a resumed run needs a pass before its first one.
        """
        batch = next(self._data)
        self._data = chain([batch], self._data)
        with self._accelerator.autocast():
            losses = self.model(batch, self._generator)
        self._accelerator.backward(losses["loss"])
        self._optimizer.optimizer.zero_grad()

    def update(self, step: int) -> None:
        """Update the weights once. Nothing in here waits for the GPU."""
        accelerator, config = self._accelerator, self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.rate(step)
        for micro in range(config.accumulation):
            batch = next(self._data)
            index = (step * config.accumulation + micro) * accelerator.num_processes + accelerator.process_index
            seed = mix_seed(config.seed, index)
            self._generator.manual_seed(seed)
            torch.manual_seed(seed)  # for layers that take no generator, such as dropout
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    losses = self.model(batch, self._generator)
                accelerator.backward(losses["loss"])
            self._meter.add(step + 1, batch["ids"], losses)
        norm = accelerator.clip_grad_norm_(self._parameters, config.max_grad_norm)
        self._meter.add_norm(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update(step)

    def report(self, step: int) -> None:
        """Log, save and validate after ``step`` updates, whatever is due."""
        config = self._config

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == config.steps)

        self.log.advance(step)
        if not any(map(due, (config.log_every, config.checkpoint_every, config.validate_every))):
            return
        self._meter.collect(self._checkpoints.last_good())
        if due(config.log_every):
            self._write_row(step)
        if due(config.checkpoint_every):
            self._save(step)
        if due(config.validate_every):
            self._validate(step)
        self._meter.go_on()

    def export(self) -> None:
        """Write the results."""
        weights = gather_model(self.model)
        averaged = weights | self._averages()

        def write(name: str, weights: dict[str, Tensor]) -> None:
            with replacing(self._output / name) as folder:
                self._copy_with(weights).save(folder)

        on_main(self._accelerator, lambda: write(self._task.name, averaged))
        if self._ema is not None:
            on_main(self._accelerator, lambda: write(f"{self._task.name}-live", weights))

    def _write_row(self, step: int) -> None:
        meter = self._meter
        self.seconds, self.pictures = self.seconds + meter.seconds, self.pictures + meter.pictures
        speed = round(meter.pictures / meter.seconds, 2)
        means = meter.take()
        norm = {GRADIENT_NORM: means.pop(GRADIENT_NORM)} if GRADIENT_NORM in means else {}
        self.losses = means
        row = {"lr": self._config.rate(step - 1), **means, **norm, "pictures_per_second": speed}
        on_main(self._accelerator, lambda: self.log.row(step, row))

    def _save(self, step: int) -> None:
        accelerator = self._accelerator
        tensors = {
            "model": gather_model(self.model),
            "optimizer": gather_optimizer(self.model, self._optimizer.optimizer),
            "ema": self._averages(),
        }
        state = {
            "settings": self._settings,
            "data": gather_object([self._batches.state_dict()]),
            "losses": self.losses,
            "totals": self._meter.totals,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers")},
        }
        on_main(accelerator, lambda: self._checkpoints.write(step, tensors, state))

    def _validate(self, step: int) -> None:
        weights = gather_model(self.model) | self._averages()

        def work() -> None:
            folder = self._output / "validation" / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            task = self._copy_with(weights).to(self._accelerator.device)
            with torch.no_grad(), self._accelerator.autocast():
                self.log.validation(step, task.validate(step, folder))
            task.to("cpu")

        on_main(self._accelerator, work)

    def _averages(self) -> dict[str, Tensor]:
        return self._ema.state_dict(empty=not self._accelerator.is_main_process) if self._ema is not None else {}

    def _copy_with(self, weights: dict[str, Tensor]) -> Task:
        self._copy.load_state_dict(weights)
        return self._copy

    def _resume(self) -> dict[str, Any]:
        """Go to the newest checkpoint and return its state; an empty one if there is none."""
        checkpoint = self._checkpoints.newest()
        if checkpoint is None:
            return {}
        before, now = checkpoint.state["settings"], self._settings
        names = [name for name in {**now, **before} if name not in _MAY_CHANGE and now.get(name) != before.get(name)]
        if names:
            changed = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
            raise UsageError(
                f"{self._output} holds a run with other settings: {changed}. Choose another output folder, or the "
                "same settings to go on."
            )
        restore(self.model, self._optimizer.optimizer, checkpoint)
        if self._ema is not None:
            self._ema.load_state_dict(checkpoint.tensors["ema"])
        if self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self._batches.load_state_dict(checkpoint.state["data"][self._accelerator.process_index])
        logger.info("%s goes on from %s", self._task.name, checkpoint.path)
        return checkpoint.state

    def _check_output(self, resume: bool) -> None:
        """Refuse to write over another run.

        Raises:
            UsageError: ``output`` cannot be used, see `train`.
        """
        begun = bool(self._checkpoints.paths())
        if begun and not resume:
            raise UsageError(f"{self._output} holds a run already. Go on with it (resume), or choose another folder.")
        for name in (self._task.name, f"{self._task.name}-live"):
            if not begun and (self._output / name).exists():
                raise UsageError(
                    f"{self._output / name} exists, and there is no checkpoint of the run that made it: it would be "
                    "replaced. Choose another output folder, or move it away."
                )


def _trained_parameters(task: Task) -> list[nn.Parameter]:
    """Return what the optimiser gets.

    Raises:
        UsageError: nothing is trained, or not in float32.
    """
    parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}
    wrong = [f"{name} ({p.dtype})" for name, p in parameters.items() if p.dtype != torch.float32]
    if wrong or not parameters:
        found = f"of another type are {', '.join(wrong[:3])}" if wrong else "there are none"
        raise UsageError(
            f"The parameters that {task.name} trains must be float32, and {found}. What is computed in is chosen with "
            "`precision`."
        )
    return list(parameters.values())


def _settings(config: TrainerConfig, task: Task, processes: int) -> dict[str, Any]:
    """Return what decides the numbers of a run, as JSON gives it back."""
    values = asdict(config) | {"task": task.name, "processes": processes}
    found: dict[str, Any] = json.loads(json.dumps(values | {f"task.{k}": v for k, v in task.settings().items()}))
    return found
