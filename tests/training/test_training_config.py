"""Settings of training runs: what counts more, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from icexport import conditions
from icexport.errors import UsageError
from training.config import assignments, controlnet_run, merge, probe_run
from training.presets import preset

NEEDED = {"model": {"cond": "depth"}, "data": {"source": "pictures"}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(
        """
        [model]
        cond = "canny"
        base = "owner/name"
        [data]
        source = ["a-{0..3}.tar", "b.tar"]
        resolution = [64, 96]
        [condition]
        low_threshold = 10
        [loss]
        preset = "controlnet++"
        reward_range = [0, 300]
        [controlnet]
        text_dropout = 0.25
        [training]
        steps = 77
        ema_decay = "none"
        betas = [0.9, 0.99]
        trackers = ["tensorboard"]
        max_grad_norm = inf
        [validation]
        guidance = 3
        """
    )
    return file


def test_without_a_file_the_preset_counts() -> None:
    run = controlnet_run(None, NEEDED)
    published = preset("innercontrol", "depth")
    assert run.loss == published.loss
    assert (run.training.steps, run.training.accumulation) == (10_000, 4)
    assert run.own_size
    assert run.condition == conditions.get("depth", model="reference")
    named = controlnet_run(None, merge(NEEDED, assignments(["model.base=owner/name", "condition.model=owner/depth"])))
    assert named.condition == conditions.get("depth", model="owner/depth")
    assert (run.model.base, run.model.controlnet) == ("reference", None)


def test_the_file_counts_more_than_the_preset_and_options_count_more_than_the_file(recipe: Path) -> None:
    run = controlnet_run(recipe, merge({"training": {"batch_size": 2}}, assignments(["training.steps=5"])))
    assert (run.training.steps, run.training.batch_size, run.training.weight_decay) == (5, 2, 1e-2)
    assert (run.training.ema_decay, run.training.betas, run.training.trackers) == (None, (0.9, 0.99), ("tensorboard",))
    assert run.training.max_grad_norm == math.inf
    assert (run.loss.alpha, run.loss.reward_range, run.loss.beta) == (1.0, (0, 300), 0)
    assert (run.data.source, run.data.resolution, run.own_size) == (("a-{0..3}.tar", "b.tar"), (64, 96), False)
    assert run.condition == conditions.get("canny", low_threshold=10.0)
    assert (run.controlnet.text_dropout, run.validation.guidance) == (0.25, 3.0)
    other = controlnet_run(recipe, {"loss": {"preset": "finetune"}})
    assert (other.loss.alpha, other.loss.reward_range) == (0, (0, 300))


def test_probes_have_a_recipe_of_their_own() -> None:
    run = probe_run(None, merge(NEEDED, assignments(["probe.output_scale=2", "probe.head_dims=[8]"])))
    assert (run.training.learning_rate, run.training.steps, run.training.ema_decay) == (1e-3, 5000, None)
    sizes = {"output_scale": 2, "head_dims": (8,), "timestep_convention": "true", "control_range": (-1.0, 1.0)}
    assert run.probe.sizes == sizes


def test_everything_that_is_wrong_is_told_at_once() -> None:
    wrong = [
        "model.contrlnet=x",
        "data.flip=1",
        "data.resolution=[1, 2, 3]",
        "condition.high_threshold=high",
        "loss.alpha=true",
        "loss.alignment_range=[5]",
        "training.stepz=1",
        "training.optimizer=sgd",
        "training.precision=fp8",
        "controlnet.text_dropout=2",
        "validation.count=0",
        "trainer.seed=1",
    ]
    with pytest.raises(UsageError) as error:
        controlnet_run(None, merge({"model": {"cond": "canny"}}, assignments(wrong)))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(wrong)
    for text in (
        "[trainer]: unknown section; did you mean training?",
        "model.contrlnet: unknown; did you mean controlnet?",
        "condition.high_threshold: got 'high', expected number",
        "data.source: missing; give --data",
        "data.flip: got 1, expected true or false",
        "data.resolution: got [1, 2, 3], expected whole number or a list of 2 whole numbers",
        "training.stepz: unknown; did you mean steps?",
        "training.precision: got 'fp8', expected 'no' or 'bf16' or 'fp16'",
        "loss.alpha: got True, expected number",
        "loss.alignment_range: got [5], expected a list of 2 whole numbers",
        "[controlnet]: text_dropout is 2.0, expected 0 to 1",
        "[validation]: Validation: count is 0, expected 1 or more.",
    ):
        assert any(line.strip().startswith(text) for line in lines), text


def test_ranges_are_checked_where_types_are_right() -> None:
    with pytest.raises(
        UsageError, match=r"\[training\].*optimizer is 'sgd'.*steps|\[training\].*steps is 0.*optimizer"
    ):
        probe_run(None, merge(NEEDED, assignments(["training.optimizer=sgd", "training.steps=0"])))


@pytest.mark.parametrize("cond", [None, "sketch"])
def test_the_condition_is_needed(cond: str | None) -> None:
    with pytest.raises(UsageError, match="--cond with one of canny, hed, lineart, depth"):
        probe_run(None, {"model": {"cond": cond}} if cond else {})


@pytest.mark.parametrize("text", ["steps=1", "training.steps", "training.=1", "training.steps="])
def test_assignments_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"SECTION\.KEY=VALUE"):
        assignments([text])


def test_assigned_values_are_tomls_or_text() -> None:
    texts = ["a.b=1e-3", "a.c=[1, 2]", "a.d = true", "a.e='quoted'", "a.f=plain text", "a.g=x=y"]
    found = assignments(texts)["a"]
    assert found == {"b": 1e-3, "c": [1, 2], "d": True, "e": "quoted", "f": "plain text", "g": "x=y"}


@pytest.mark.parametrize(("text", "message"), [("steps = 1", "belongs to no section"), ("[model", "not a TOML file")])
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        probe_run(tmp_path / "x.toml", NEEDED)
