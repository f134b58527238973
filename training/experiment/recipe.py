"""The experiment's settings: what is trained, with which arms, and how it is judged."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from icexport.errors import UsageError
from training.loop.trainer import TrainerConfig
from training.tasks.losses import LossConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = Path(__file__).parents[1] / "recipes" / "experiment.toml"

ProbeKind = Literal["attn", "conv", "plain", "random", "held-out"]
"""Which probe: the usual one; on convolution taps; trained without any ControlNet; never trained; of another seed."""


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget.

    Attributes:
        name: name of the table in the recipe.
        loss: what is minimised besides the diffusion loss.
        probe: what the alignment reads with.
    """

    name: str
    loss: LossConfig
    probe: ProbeKind = "attn"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the experiment's outcome; see ``training/recipes/experiment.toml``."""

    conditions: tuple[str, ...]
    seeds: tuple[int, ...]
    scenes: int
    held_out: int
    steps: int
    guidance_scale: float
    text_dropout: float
    fork: TrainerConfig
    probe: TrainerConfig
    judge: TrainerConfig
    training: TrainerConfig
    arms: tuple[Arm, ...]
    claim: tuple[str, ...]

    @classmethod
    def load(cls, path: Path = DEFAULT) -> Recipe:
        """Read a TOML file.

        Raises:
            UsageError: the file is no recipe.
        """
        try:
            return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:  # UsageError is a ValueError
            raise UsageError(f"{path} is not a recipe of the experiment: {error}. Start from {DEFAULT}.") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Make a recipe from the tables of a TOML file."""
        values = dict(values)
        arms = [_arm(name, dict(table)) for name, table in values.pop("arms").items()]
        for name in ("fork", "probe", "judge", "training"):
            values[name] = TrainerConfig(**_training(values[name]))
        for name in ("conditions", "seeds", "claim"):
            values[name] = tuple(values[name])
        return cls(**values, arms=tuple(arms))

    def arm(self, name: str) -> Arm:
        """Return the arm called ``name``.

        Raises:
            UsageError: there is no such arm.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UsageError(f"There is no arm {name!r}. Arms: {', '.join(arm.name for arm in self.arms)}.")


def _arm(name: str, table: dict[str, Any]) -> Arm:
    probe = table.pop("probe", "attn")
    if probe not in get_args(ProbeKind):
        raise UsageError(f"arms.{name}.probe is {probe!r}; expected one of {', '.join(get_args(ProbeKind))}")
    return Arm(name, LossConfig(**table), probe)


def _training(table: dict[str, Any]) -> dict[str, Any]:
    """Ask for one checkpoint at the end, which is enough: a stage takes minutes."""
    return {"checkpoint_every": table["steps"], "keep_checkpoints": 1} | table
