from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from icexport.errors import UsageError
from training.experiment import __main__ as command
from training.experiment import report
from training.experiment.recipe import DEFAULT, Recipe
from training.experiment.run import RESULT, run_arm
from training.experiment.setting import Setting

STAGE = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}
TINY: dict[str, Any] = {
    "conditions": ["canny"],
    "seeds": [0, 1],
    "claim": ["finetune"],
    "scenes": 4,
    "held_out": 3,
    "steps": 2,
    "guidance_scale": 3.0,
    "text_dropout": 0.3,
    **dict.fromkeys(("fork", "probe", "judge", "training"), STAGE),
    "arms": {"finetune": {}, "both": {"alpha": 1.0, "beta": 1.0, "alignment_range": [0, 920]}},
}


def test_the_recipe_holds_every_arm() -> None:
    recipe = Recipe.load()
    arms = {arm.name: arm for arm in recipe.arms}
    assert {"finetune", "reward", "alignment", "both", "random-probe", "conv-taps", "range-200", "range-600"} <= set(
        arms
    )
    assert arms["finetune"].loss.alpha == arms["finetune"].loss.beta == 0
    assert arms["alignment"].loss.alignment_range == (0, 920)
    assert arms["range-200"].loss.alignment_range == (0, 200)
    assert len(recipe.seeds) >= 3
    with pytest.raises(UsageError, match="no arm 'none'"):
        recipe.arm("none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("probe = 'best'", "arms.finetune.probe is 'best'"),
        ("gamma = 1", "gamma"),
        ("beta = -1", "beta"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(DEFAULT.read_text().replace("[arms.finetune]", f"[arms.finetune]\n{line}"))
    with pytest.raises(UsageError, match=message):
        Recipe.load(path)


def test_an_arm_is_trained_judged_and_not_run_again(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(TINY)
    command.prepare(recipe, "canny", tmp_path)
    assert [(job[1].name, job[2]) for job in command.jobs(recipe, tmp_path)] == [
        ("finetune", 0), ("finetune", 1), ("both", 0), ("both", 1),
    ]  # fmt: skip
    setting = Setting(recipe, "canny", tmp_path)
    before = {name: p.clone() for name, p in setting.models.unet.named_parameters()}
    folder = run_arm(setting, recipe.arm("both"), 0)
    assert all((p == before[name]).all() for name, p in setting.models.unet.named_parameters())
    result = json.loads((folder / RESULT).read_text())
    assert set(result["losses"]) == {"loss", "diffusion", "reward", "alignment"}
    assert len(result["trained_metric"]) == recipe.held_out
    assert {row["timestep"] for row in result["probes"]["held-out"]} == {200, 600, 920}
    assert len(command.jobs(recipe, tmp_path)) == 3
    stamp = (folder / RESULT).stat().st_mtime_ns
    run_arm(setting, recipe.arm("both"), 0)
    assert (folder / RESULT).stat().st_mtime_ns == stamp


def _fake(folder: Path, score: float, spread: float = 0.0) -> None:
    """A finished run whose held-out scenes score ``score`` plus a ramp."""
    folder.mkdir(parents=True)
    values = [score + 0.001 * i + spread * (-1) ** i for i in range(40)]
    probes = {kind: [{"timestep": 0, "matched": 0.02}] for kind in ("attn", "held-out")}
    leak = {"attn": [{"timestep": 200, "to_picture": 0.02, "to_control": 0.04}]}
    found = {
        "gradients": {"diffusion": 0.1},
        "leak": leak,
        "trained_metric": values,
        "judge_rmse": values,
        "features": [[score, 1.0], [0.5, 2.0]],
        "probes": probes,
    }
    (folder / RESULT).write_text(json.dumps(found))


def test_differences_are_paired_by_seed_and_scene(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({**TINY, "conditions": ["canny", "depth"]})
    for condition in recipe.conditions:
        for name in ("start", "prompt-only", "real"):
            _fake(tmp_path / condition / name, 0.1)
        for seed, base in ((0, 0.5), (1, 0.6)):
            _fake(tmp_path / condition / "finetune" / f"seed-{seed}", base)
        _fake(tmp_path / condition / "both" / "seed-0", 0.55, spread=0.01)
    canny = report.rows(recipe, tmp_path, "canny", report.PRIMARY["canny"])
    assert [row.arm for row in canny] == ["finetune", "both"]
    assert canny[0].difference is None
    assert canny[0].mean == pytest.approx(0.55 + 0.0195)
    assert canny[1].by_seed == pytest.approx([0.05])
    mean, low, high = canny[1].difference or (0, 0, 0)
    assert mean == pytest.approx(0.05)
    assert 0.045 < low < mean < high < 0.055
    depth = report.rows(recipe, tmp_path, "depth", report.PRIMARY["depth"])
    assert depth[1].by_seed == pytest.approx([-0.05]), "less is better for depth"

    report.write(recipe, tmp_path, tmp_path / "docs", "a test")
    text = (tmp_path / "docs" / "experiment.md").read_text()
    assert "| both | 1 | 0.5695 | +0.05 [" in text
    assert "Run on a test." in text
    assert "| 200 | 0.0200 | 0.0400 |" in text
    assert (tmp_path / "docs" / "images" / "experiment.png").stat().st_size > 1000
    report.write(recipe, tmp_path, tmp_path / "docs", "another test")
    again = (tmp_path / "docs" / "experiment.md").read_text()
    assert again.count("### canny") == 1
    assert "another test" in again


def test_more_seeds_of_the_same_scenes_make_no_interval_narrower(tmp_path: Path) -> None:
    """The seeds share their scenes, and with them what makes a scene hard."""
    recipe = Recipe.from_dict(TINY)
    found = []
    for seeds in ((0,), (0, 1)):
        work = tmp_path / str(len(seeds))
        for seed in seeds:
            _fake(work / "canny" / "finetune" / f"seed-{seed}", 0.5)
            _fake(work / "canny" / "both" / f"seed-{seed}", 0.55, spread=0.02)
        found.append(report.rows(recipe, work, "canny", report.PRIMARY["canny"])[1].difference)
    one, two = found
    assert two == pytest.approx(one)
    _, low, high = one or (0, 0, 0)
    assert high - low == pytest.approx(2 * 1.96 * 0.02 / 40**0.5, rel=0.1)
