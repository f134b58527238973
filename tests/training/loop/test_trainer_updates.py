"""What an update does to the weights, beside plain PyTorch: rate, clipping, and every setting of AdamW."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.training.toy_task import ToyBatches, ToyTask
from training.loop.optimizers import new_optimizer
from training.loop.trainer import TrainerConfig, train

RISE = [0.05, 0.1]
CONFIG = TrainerConfig(
    steps=8,
    batch_size=4,
    learning_rate=0.1,
    warmup=2,
    schedule="linear",
    decay=0.5,
    weight_decay=0.3,
    betas=(0.6, 0.8),
    eps=0.02,  # of the size of a clipped gradient, so that it matters how large that is
    max_grad_norm=0.5,
    ema_decay=None,
    checkpoint_every=3,
)
RATES = {
    "constant": [*RISE, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
    "linear": [*RISE, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025],
    "cosine": [*RISE, 0.1, 0.1, 0.1, 0.1 * (0.5 + math.sqrt(0.125)), 0.05, 0.1 * (0.5 - math.sqrt(0.125))],
}


@pytest.fixture
def stepped() -> Iterator[list[dict[str, Any]]]:
    """The groups of every optimiser at each of its steps, as they were when it took the step."""
    found: list[dict[str, Any]] = []

    def note(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        found.extend({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)

    handle = register_optimizer_step_pre_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("schedule", RATES)
def test_the_optimiser_steps_at_the_rate_of_the_schedule(
    tmp_path: Path, stepped: list[dict[str, Any]], schedule: Any
) -> None:
    train(ToyTask(), ToyBatches(), replace(CONFIG, schedule=schedule), tmp_path)
    assert [group["lr"] for group in stepped] == pytest.approx(RATES[schedule])


def test_a_resumed_run_goes_on_in_the_schedule(tmp_path: Path, stepped: list[dict[str, Any]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ToyTask(), ToyBatches(stop_at=7), CONFIG, tmp_path)
    stepped.clear()
    train(ToyTask(), ToyBatches(), CONFIG, tmp_path)
    rates = [group["lr"] for group in stepped if group["lr"]]  # restoring steps once at 0, to make the moments
    assert rates == pytest.approx(RATES["linear"][6:])


def by_hand(task: ToyTask, config: TrainerConfig, rates: list[float]) -> list[float]:
    """Train ``task`` as a textbook would; the gradients' norms before they were clipped."""
    optimizer = torch.optim.AdamW(
        task.net.parameters(),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=False,
        foreach=False,
    )
    norms = []
    for rate, batch in zip(rates, ToyBatches(), strict=False):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        task(batch, torch.Generator())["loss"].backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in task.net.parameters()))
        for parameter in task.net.parameters():
            parameter.grad *= min(1.0, config.max_grad_norm / norm)
        optimizer.step()
        norms.append(norm)
    return norms


CHANGES: list[dict[str, Any]] = [
    {"weight_decay": 0.0},
    {"betas": (0.9, 0.8)},
    {"betas": (0.6, 0.99)},
    {"eps": 1e-8},
    {"max_grad_norm": math.inf},
]


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("change", [{}, *CHANGES], ids=str)
def test_updates_are_those_of_adamw_with_the_settings_of_the_run(
    tmp_path: Path, change: dict[str, Any], steps: int
) -> None:
    config = replace(CONFIG, schedule="constant", steps=steps, **change)
    trained, expected = ToyTask(dropout=0, noise=0), ToyTask(dropout=0, noise=0)
    norms = by_hand(expected, config, RATES["constant"][:steps])
    assert norms[0] > 2 * CONFIG.max_grad_norm, "or clipping would not show"
    train(trained, ToyBatches(), config, tmp_path)
    start = ToyTask(dropout=0, noise=0).net.state_dict()
    for name, value in trained.net.state_dict().items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(value, expected.net.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_settings_of_the_reference_all_matter() -> None:
    start = ToyTask(dropout=0, noise=0)

    def after(**change: Any) -> torch.Tensor:
        task = deepcopy(start)
        by_hand(task, replace(CONFIG, **change), RATES["linear"][:2])
        return torch.cat([p.detach().flatten() for p in task.net.parameters()])

    plain = after()
    for change in CHANGES:
        assert (after(**change) - plain).abs().max() > 1e-3, change


def test_the_8_bit_optimiser_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    parameters = list(ToyTask().net.parameters())
    settings: dict[str, Any] = {"betas": (0.6, 0.8), "eps": 0.02, "weight_decay": 0.3}
    for name in ("adamw", "adamw-8bit"):
        (group,) = new_optimizer(name, parameters, torch.device("cpu"), **settings).param_groups
        assert {key: group[key] for key in settings} == settings
        assert group["params"] == parameters
        assert group["lr"] == 0
