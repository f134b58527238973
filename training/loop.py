"""One training loop for every stage: schedule, EMA, checkpoints that resume, and a loss curve on disk.

Under ``torchrun`` every process draws its own part of the batch and gradients are averaged. On a CPU, N processes of
one thread are faster than one process of N threads: no barrier inside every operator.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageConfig:
    """How long and how fast one stage trains.

    Attributes:
        steps: optimiser updates in all.
        batch_size: pictures per update, all processes together.
        learning_rate: peak of the schedule (linear warm-up, constant, then linear decay to zero).
        warmup: updates of the warm-up.
        decay: share of ``steps`` over which the rate falls to zero. A constant middle lets a stage be cut short or
            prolonged between two resumes without another schedule.
        weight_decay: AdamW's.
        seed: of the data order, the noise and the initial weights.
        checkpoint_every: updates between two checkpoints; an interruption loses at most these.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.35
    weight_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 250

    def rate(self, step: int) -> float:
        """Learning rate of update ``step`` (0-based)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * rise * fall


class Ema:
    """Moving average of parameters with diffusers' (1+n)/(10+n) warm-up, kept apart from the live ones."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.999) -> None:
        self.live = list(parameters)
        self.mean = [p.detach().clone() for p in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the live parameters after update ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def copy_to_live(self) -> None:
        """Replace the live parameters by the averages: once, at the end of a stage."""
        torch._foreach_copy_([p.detach() for p in self.live], self.mean)


def world() -> tuple[int, int]:
    """Rank of this process and number of processes: (0, 1) outside ``torchrun``."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    )


def fit(
    name: str,
    modules: Iterable[nn.Module],
    loss_fn: Callable[[int, torch.Generator], dict[str, torch.Tensor]],
    config: StageConfig,
    work: Path,
) -> None:
    """Train ``modules`` in place, ending with the averaged weights.

    Args:
        name: of the stage; names its files in ``work``.
        modules: everything whose parameters with ``requires_grad`` are trained.
        loss_fn: draws a batch of the given size with the generator and returns named scalar losses; ``loss`` is
            minimised. Every random choice must come from the generator: it is seeded anew for each update, so that a
            resumed run repeats the uninterrupted one.
        config: the stage's schedule.
        work: folder of ``<name>.pt`` (live weights, averages and optimiser state) and ``<name>.jsonl``.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is left as it was.
    """
    modules = nn.ModuleList(modules)
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    ema = Ema(parameters)
    rank, processes = world()
    generator = torch.Generator()
    checkpoint = work / f"{name}.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        ema.mean = state["ema"]
        logger.info("%s: resumed at step %d", name, first)

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".tmp")
        state = {"step": step, "modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"ema": ema.mean}, partial)
        partial.replace(checkpoint)

    work.mkdir(parents=True, exist_ok=True)
    sums: dict[str, float] = {}
    started, since = time.perf_counter(), first
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        generator.manual_seed((config.seed << 40) + (step << 8) + rank)
        losses = loss_fn(config.batch_size // processes, generator)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if processes > 1:
            _average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{name}: loss or gradient is not finite at step {step}; see {checkpoint}")
        optimizer.step()
        ema.update(step)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        done = step + 1
        if rank == 0 and (done % 50 == 0 or done == config.steps):
            seconds, count = time.perf_counter() - started, done - since
            row = {"step": done, "lr": config.rate(step)} | {k: round(v / count, 6) for k, v in sums.items()}
            row["pictures_per_second"] = round(count * config.batch_size / seconds, 1)
            with (work / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            logger.info("%s %s", name, row)
            sums, started, since = {}, time.perf_counter(), done
        if rank == 0 and (done % config.checkpoint_every == 0 or done == config.steps):
            save(done)
    ema.copy_to_live()
