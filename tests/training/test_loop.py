from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from training.loop import Ema, StageConfig, fit

CONFIG = StageConfig(steps=60, batch_size=4, learning_rate=0.05, warmup=5, checkpoint_every=20)


def train(folder: Path, config: StageConfig = CONFIG, stop_at: int | None = None) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    calls = 0

    def loss_fn(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if stop_at is not None and calls > stop_at:
            raise KeyboardInterrupt
        x = torch.randn(batch_size, 3, generator=generator)
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    fit("toy", [model], loss_fn, config, folder)
    return model


def test_training_learns_and_logs(tmp_path: Path) -> None:
    model = train(tmp_path, replace(CONFIG, steps=300))
    assert torch.allclose(model.weight, torch.ones(1, 3), atol=0.1)
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]


def test_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=47)
    assert torch.load(tmp_path / "cut" / "toy.pt", weights_only=True)["step"] == 40
    resumed = train(tmp_path / "cut")
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def loss_fn(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        count["n"] += 1
        return {"loss": model(torch.ones(1, 1)).sum() * (float("nan") if count["n"] > 30 else 1.0)}

    count = {"n": 0}
    with pytest.raises(FloatingPointError, match="step 30"):
        fit("toy", [model], loss_fn, CONFIG, tmp_path)
    assert torch.load(tmp_path / "toy.pt", weights_only=True)["step"] == 20


def test_schedule_warms_up_stays_and_decays() -> None:
    config = StageConfig(steps=100, batch_size=1, learning_rate=1.0, warmup=10, decay=0.5)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(30) == 1.0
    assert config.rate(75) == pytest.approx(0.5)
    assert config.rate(99) == pytest.approx(0.02)


def test_average_is_apart_from_the_live_weights() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    ema = Ema([parameter], decay=0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    ema.update(step=1000)
    assert torch.allclose(ema.mean[0], torch.full((2,), 0.1))
    assert torch.equal(parameter.detach(), torch.ones(2))
