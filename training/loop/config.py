"""How a run trains, apart from its task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from icexport.errors import UsageError
from training.loop.optimizers import OPTIMIZERS

Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how fast and how carefully to train. One update is ``accumulation`` micro steps in every process.

    Attributes:
        steps: number of updates in all.
        batch_size: number of pictures of one micro step of one process; what ``batches`` yields, noted here for the
            record.
        accumulation: number of micro steps of an update.
        learning_rate: peak of the learning rate.
        warmup: number of updates over which the rate rises linearly.
        schedule: how the rate falls: not at all, linearly, or as half a cosine.
        decay: share of ``steps``, at the end, over which the rate falls to zero.
        weight_decay: weight decay of AdamW.
        betas: betas of AdamW.
        eps: epsilon of AdamW.
        max_grad_norm: gradients are scaled down to this norm; ``math.inf`` leaves them as they are.
        optimizer: ``adamw``, or ``adamw-8bit`` of bitsandbytes.
        precision: what the forward pass computes in; parameters are float32 in any case.
        ema_decay: decay of the averaged weights; None trains without.
        seed: seed of every random choice of the task.
        checkpoint_every: number of updates between two checkpoints.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: number of updates between two rows of the log.
        validate_every: number of updates between two validations; 0: never.
        trackers: names of trackers that Accelerate knows, such as ``tensorboard``.

    Raises:
        UsageError: values that cannot be used; all of them are listed.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-5
    warmup: int = 0
    schedule: Schedule = "constant"
    decay: float = 1.0
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    precision: Precision = "no"
    ema_decay: float | None = 0.9999
    seed: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 50
    validate_every: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every")
        choices = {"schedule": get_args(Schedule), "precision": get_args(Precision), "optimizer": OPTIMIZERS}
        wanted = {name: (getattr(self, name) >= 1, "at least 1") for name in counts}
        wanted |= {
            name: (getattr(self, name) >= 0, "at least 0") for name in ("warmup", "weight_decay", "validate_every")
        }
        wanted |= {name: (getattr(self, name) > 0, "above 0") for name in ("learning_rate", "eps", "max_grad_norm")}
        wanted |= {name: (getattr(self, name) in c, f"one of {', '.join(c)}") for name, c in choices.items()}
        wanted["decay"] = (0 < self.decay <= 1, "above 0 and at most 1")
        wanted["betas"] = (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        wanted["ema_decay"] = (self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1), or None")
        faults = [
            f"{name} is {getattr(self, name)!r}, not {rule}" for name, (fine, rule) in wanted.items() if not fine
        ]
        if faults:
            raise UsageError(f"Training cannot run with these settings: {'; '.join(faults)}.")

    def rate(self, step: int) -> float:
        """Return the learning rate of update ``step`` (0-based)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = min(1.0, (self.steps - step) / (self.decay * self.steps))
        fall = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[self.schedule]
        return self.learning_rate * rise * fall
