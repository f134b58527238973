"""``icexport evaluate``: options in, one document and the files out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.steps import shown_steps

SHORT = ("--steps", "1", "--images-per-condition", "2", "--max-samples", "2")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("held-out"), []
    for i in range(3):
        levels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": "a b"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_a_model(icexport, tiny_model: Path, held_out: Path, tmp_path: Path) -> None:
    args = ("evaluate", "--data", held_out, "--model", tiny_model, "--cond", "canny", *SHORT)
    run = icexport(*args, "--no-control", "--output", tmp_path / "new" / "out", "--json")
    assert run.exit_code == 0, run.stderr
    assert shown_steps(run.stderr) == [
        "load the model", "load the metrics", "read the data", "draw pictures", "draw pictures-no-control",
        "score pictures", "score pictures-no-control", "write the report",
    ]  # fmt: skip
    result = json.loads(run.stdout)
    assert result == json.loads((tmp_path / "new" / "out" / "evaluation.json").read_text())
    assert result["data"]["pictures"] == 4
    assert result["settings"]["size"] == [16, 16]  # the model's own, whatever the pictures have
    assert result["settings"]["negative_prompt"] == "worst quality, low quality"
    assert result["metrics"]["edge_f1"]["no_control"]["mean"] >= 0
    names = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == [
        "control-maps", "evaluation.json", "pictures", "pictures-no-control", "report.html", "settings.json",
    ]  # fmt: skip


def test_a_bundle(icexport, tiny_bundle: Path, held_out: Path, tmp_path: Path) -> None:
    args = ("evaluate", "--data", held_out, "--bundle", tiny_bundle, *SHORT, "--output", tmp_path / "out")
    run = icexport(*args, "--backend", "onnxruntime")
    assert run.exit_code == 0, run.stderr
    assert "edge F1 with tolerance" in run.stdout
    assert "(published protocol)" in run.stdout
    assert str(tmp_path / "out" / "report.html") in run.stdout
    run = icexport(*args, "--seed", "7")
    assert run.exit_code == 2
    assert "seed was 42 and is 7" in run.stderr


def test_finished_pictures(icexport, held_out: Path, tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    for i in range(3):
        Image.open(held_out / f"{i}.png").save(tmp_path / "drawn" / f"{i}.png-0.png")
    args = ("evaluate", "--data", held_out, "--pictures", tmp_path / "drawn", "--cond", "canny")
    run = icexport(*args, "--images-per-condition", "1", "--output", tmp_path / "out", "--json")
    assert run.exit_code == 0, run.stderr
    assert shown_steps(run.stderr)[2:] == ["read the data", "score drawn", "write the report"]
    assert json.loads(run.stdout)["metrics"]["edge_f1"]["control"] == {"mean": 1, "low": 1, "high": 1}
    run = icexport(*args, "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert "lacks 9 of 12 pictures" in run.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Give one of --model"),
        (("--model", "reference", "--bundle", "BUNDLE"), "Give one of --model"),
        (("--model", "reference"), "Name the condition"),
        (("--model", "reference", "--cond", "pose"), "no condition 'pose'"),
        (("--bundle", "BUNDLE", "--cond", "hed"), "is a bundle for canny"),
        (("--bundle", "BUNDLE", "--depth-model", "x/y"), "--depth-model is for --cond depth, not for canny"),
        (("--model", "reference", "--cond", "canny", "--height", "64"), "both --height and --width"),
        (("--model", "reference", "--cond", "canny", "--scheduler", "Nope"), "no scheduler 'Nope'"),
        (("--pictures", "EMPTY", "--cond", "canny"), "has no PNG pictures"),
        (("--bundle", "BUNDLE", "--no-control", "--inception-weights", "missing.pth"), "missing.pth"),
        (("--bundle", "BUNDLE", "--batch-size", "0"), "--batch-size"),
    ],
)
def test_wrong_options(icexport, tiny_bundle: Path, held_out: Path, tmp_path: Path, args, message: str) -> None:
    (tmp_path / "empty").mkdir()
    paths = {"BUNDLE": tiny_bundle, "EMPTY": tmp_path / "empty"}
    run = icexport(
        *("evaluate", "--data", held_out, "--output", tmp_path / "out"), *(paths.get(arg, arg) for arg in args)
    )
    assert run.exit_code == 2, run.stderr
    assert message in run.stderr
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(icexport, tiny_model: Path, tmp_path: Path) -> None:
    args = ("evaluate", "--data", tmp_path / "nowhere", "--model", tiny_model, "--cond", "canny")
    run = icexport(*args, "--output", tmp_path / "out")
    assert run.exit_code in (1, 2)
    assert "nowhere" in run.stderr
    assert "Traceback" not in run.stderr
