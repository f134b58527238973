"""A small task with everything that makes resuming hard: dropout, noise, a loss that comes and goes, shards of data.

As a program it is what the tests of several processes and of signals start: a list of runs as JSON, one after another.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from training.loop.trainer import Batch, Task, TrainerConfig, TrainResult, make_accelerator, train

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "steps": 30,
    "batch_size": 4,
    "learning_rate": 0.02,
    "warmup": 5,
    "schedule": "linear",
    "decay": 0.4,
    "ema_decay": 0.9,
    "seed": 7,
    "checkpoint_every": 8,
    "log_every": 6,
}


@dataclass
class Frozen:
    """Stands for the networks that are not trained; copies of the task must share it."""

    net: nn.Linear


class ToyTask(Task):
    """Learns the sum of three numbers.

    Args:
        dropout: of the hidden layer, drawn by the global generator.
        noise: on the inputs, drawn by the trainer's generator.
        width: of the hidden layer.
    """

    name = "toy"

    def __init__(self, dropout: float = 0.1, noise: float = 0.1, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.frozen = Frozen(nn.Linear(3, 3).requires_grad_(False))
        self.noise = noise
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        x = batch["x"] + self.noise * torch.randn(batch["x"].shape, generator=generator)
        loss = (self.net(self.frozen.net(x)) - x.sum(1, keepdim=True)).square().mean()
        return {"loss": loss} | ({"odd": loss + 1} if batch["number"] % 2 else {})

    def save(self, folder: Path) -> None:
        save_file(self.net.state_dict(), folder / "net.safetensors")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        assert not self.training
        self.validated.append({k: v.clone() for k, v in self.state_dict().items()})
        (folder / "picture.txt").write_text(f"step {step}")
        for parameter in self.parameters():
            parameter.copy_(torch.rand_like(parameter))
        return {"error": step / 100}

    def settings(self) -> dict[str, Any]:
        return {"noise": self.noise}


@dataclass
class ToyBatches:
    """Pictures of one process, by number; ``stop_at`` raises KeyboardInterrupt instead of that batch."""

    rank: int = 0
    processes: int = 1
    size: int = 4
    stop_at: int | None = None
    bad_at: int | None = None
    pause: float = 0.0
    number: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.pause:
                time.sleep(self.pause)
            if self.number == self.stop_at:
                raise KeyboardInterrupt
            first = (self.number * self.processes + self.rank) * self.size
            pictures = range(first, first + self.size)
            x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in pictures])
            if self.number == self.bad_at:
                x[0, 0] = torch.nan
            self.number += 1
            yield {"x": x, "number": self.number - 1, "ids": [f"{i}.png" for i in pictures]}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def on_cpu_with_fsdp(config: TrainerConfig, output: Path) -> Accelerator:
    """Accelerate shards on GPUs only, but the code that it then runs works on gloo, too."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = make_accelerator(config, output)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    type(accelerator.state)._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def run(
    output: Path, task: dict[str, Any], data: dict[str, Any], config: dict[str, Any], fsdp: bool = False
) -> TrainResult:
    settings = TrainerConfig(**CONFIG | config)
    accelerator = (on_cpu_with_fsdp if fsdp else make_accelerator)(settings, output)
    batches = ToyBatches(accelerator.process_index, accelerator.num_processes, **data)
    return train(ToyTask(**task), batches, settings, output, accelerator=accelerator)


def attempt(output: str, **arguments: Any) -> None:
    try:
        run(Path(output), **{"task": {}, "data": {}, "config": {}} | arguments)
    except KeyboardInterrupt as error:
        sys.stdout.write(f"interrupted {error}\n")
    except FloatingPointError as error:
        sys.stdout.write(f"{error}\n")


def main() -> None:
    for arguments in json.loads(sys.argv[1]):
        attempt(**arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
