from __future__ import annotations

import inspect

import pytest

from icexport import conditions
from icexport.errors import UsageError
from training import presets
from training.loop.config import TrainerConfig
from training.presets import preset
from training.tasks.losses import LossConfig

CONDITIONS = conditions.names()


@pytest.mark.parametrize(
    ("name", "condition", "alpha", "reward", "beta"),
    [
        ("innercontrol", "depth", 0.5, (0, 400), 1),
        ("innercontrol", "hed", 1, (0, 200), 1),
        ("innercontrol", "lineart", 1, (0, 200), 1),
        ("innercontrol", "canny", 1, (0, 200), 1),
        ("controlnet++", "depth", 1, (0, 200), 0),
        ("controlnet++", "hed", 1, (0, 200), 0),
        ("controlnet++", "lineart", 0.5, (0, 200), 0),
        ("controlnet++", "canny", 1, (0, 200), 0),
    ],
)
def test_published_weights(name: str, condition: str, alpha: float, reward: tuple[int, int], beta: float) -> None:
    loss = preset(name, condition).loss
    assert (loss.alpha, loss.reward_range, loss.beta) == (alpha, reward, beta)
    assert loss.alignment_range == (0, 920)
    assert not loss.legacy_hed


@pytest.mark.parametrize(
    ("name", "condition", "expected"),
    [
        ("innercontrol", "depth", {"start"}),
        ("innercontrol", "hed", {"alpha", "reward_range"}),
        ("innercontrol", "lineart", {"alpha", "start"}),
        ("innercontrol", "canny", {"alpha", "reward_range", "beta", "alignment_range", "start"}),
        ("controlnet++", "depth", {"start"}),
        ("controlnet++", "canny", set()),
        ("finetune", "depth", set()),
    ],
)
def test_reconstructed_values_are_named(name: str, condition: str, expected: set[str]) -> None:
    assert set(preset(name, condition).reconstructed) == expected


@pytest.mark.parametrize("condition", CONDITIONS)
def test_finetune_differs_from_innercontrol_in_its_loss_only(condition: str) -> None:
    finetune, innercontrol = preset("finetune", condition), preset("innercontrol", condition)
    assert finetune.loss == LossConfig()
    assert finetune.training == innercontrol.training
    assert finetune.start == innercontrol.start


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_preset_is_a_trainer_config(name: str, condition: str) -> None:
    found = preset(name, condition)
    config = TrainerConfig(**found.training)
    assert (config.steps, config.batch_size, config.accumulation) == (10_000, 8, 4)
    assert (config.learning_rate, config.weight_decay, config.ema_decay) == (1e-5, 1e-2, 0.9999)
    assert set(found.reconstructed) <= {*inspect.signature(LossConfig).parameters, "start"}
    assert "256" in found.notes


def test_no_preset_changes_another() -> None:
    preset("innercontrol", "depth").training["steps"] = 1
    assert preset("innercontrol", "depth").training["steps"] == 10_000


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="no preset 'paper'. Known presets: innercontrol, controlnet\\+\\+, finetune"):
        preset("paper", "depth")
    with pytest.raises(UsageError, match="Nothing is published of controlnet\\+\\+ for condition 'pose'"):
        preset("controlnet++", "pose")
