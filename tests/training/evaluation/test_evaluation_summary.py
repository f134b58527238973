"""The numbers of an evaluation: what counts as independent when their intervals are drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from icexport import conditions
from training.evaluation.generate import Item
from training.evaluation.metrics import METRICS
from training.evaluation.scoring import CLIP, Judged, summarise

CONDITIONS, GROUPS = 40, 5
NAMES = (*METRICS["canny"], CLIP)
SETS = ("control", "no_control", "control_minus_no_control", "chance")


def of_each(values: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """``[N*G]`` scores that hardly differ between the pictures of a condition."""
    spread = torch.randn(CONDITIONS * GROUPS, generator=torch.Generator().manual_seed(seed))
    return values.repeat_interleave(GROUPS) + noise * spread


@pytest.fixture
def difficulty() -> torch.Tensor:
    return 0.1 * torch.randn(CONDITIONS, generator=torch.Generator().manual_seed(0))


def summary(tmp_path: Path, control: torch.Tensor, without: torch.Tensor, chance: torch.Tensor) -> dict[str, Any]:
    path = tmp_path / "map.png"
    Image.new("RGB", (16, 16)).save(path)
    items = [Item(f"p{i}", "a", path, "") for i in range(CONDITIONS)]
    judged = {
        "control": Judged(dict.fromkeys(NAMES, control), dict.fromkeys(NAMES, chance), {}),
        "no_control": Judged(dict.fromkeys(NAMES, without), {}, {}),
    }
    return summarise(conditions.get("canny"), items, GROUPS, judged, seed=0)


def width(row: dict[str, float]) -> float:
    assert row["low"] < row["mean"] < row["high"]
    return row["high"] - row["low"]


@pytest.mark.parametrize("name", NAMES)
def test_more_pictures_of_the_same_conditions_make_no_interval_narrower(
    tmp_path: Path, difficulty: torch.Tensor, name: str
) -> None:
    control, chance = of_each(0.7 + difficulty, 0.001, 1), of_each(0.2 + difficulty, 0.001, 2)
    row = summary(tmp_path, control, of_each(0.3 - difficulty, 0.001, 3), chance)[name]
    expected = 2 * 1.96 * float(difficulty.std()) / math.sqrt(CONDITIONS)
    factors = {"control_minus_no_control": 2.0}  # what is hard with the control is easy without it
    for which in SETS:
        assert width(row[which]) == pytest.approx(factors.get(which, 1.0) * expected, rel=0.15), which


def test_the_gain_is_that_of_the_same_condition(tmp_path: Path, difficulty: torch.Tensor) -> None:
    control, without = of_each(0.7 + difficulty, 0.001, 1), of_each(0.3 + difficulty, 0.001, 2)
    row = summary(tmp_path, control, without, control)["edge_f1"]
    assert row["control_minus_no_control"]["mean"] == pytest.approx(0.4, abs=1e-3)
    assert width(row["control_minus_no_control"]) < 0.02 * width(row["control"])
