"""``icexport train probe`` and ``train controlnet`` from the command line to models that load."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from typer.testing import CliRunner, Result

from icexport.cli.console import OURS
from icexport.cli.main import app
from icexport.models.probe import InnerControlProbe
from tests.conftest import once

Train = Callable[..., Result]
FEW = ("--steps", 4, "--batch-size", 2, "--set", "training.accumulation=1", "--set", "training.checkpoint_every=2")


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """``train("probe", "--steps", 2)`` -> result with exit_code, stdout, stderr."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", *OURS)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield lambda *args: CliRunner().invoke(app, ["train", *map(str, args)], prog_name="icexport")
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(scope="session")
def eight_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight pictures with captions, in the imagefolder convention."""

    def make(folder: Path) -> None:
        folder.mkdir()
        rng = np.random.default_rng(0)
        lines = []
        for index in range(8):
            pixels = np.full((20, 24, 3), 255, np.uint8)
            pixels[index : index + 9, 4:15] = rng.integers(0, 160, 3)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            lines.append(json.dumps({"file_name": f"{index}.png", "text": f"square {index}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))

    return once(tmp_path_factory, "eight-pictures", make)


def common(model: Path, data: Path, output: Path) -> tuple[object, ...]:
    return ("--cond", "canny", "--model", model, "--data", data, "--output", output)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(ControlNetModel.from_pretrained(folder).state_dict())


def test_a_controlnet_from_the_command_line_loads_in_diffusers_and_resumes_to_the_same_weights(
    train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path
) -> None:
    options = ("--set", "training.validate_every=4", "--set", "validation.steps=1", "--set", "validation.count=2")
    result = train("controlnet", *common(tiny_model, eight_pictures, tmp_path / "a"), *FEW, *options, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["updates"] == 4
    assert set(document["losses"]) == {"loss", "diffusion", "reward", "alignment"}
    assert document["faults"] == {"broken_pictures": 0, "without_caption": 0}
    assert document["next"].startswith(f"icexport build --cond canny --controlnet {tmp_path / 'a' / 'controlnet'}")
    assert "1 reward (t 0-200) + 1 alignment (t 0-920" in result.stderr
    assert "reconstructed, not known for certain: alpha, reward_range, beta, alignment_range" in result.stderr
    start, trained = weights(tiny_model / "controlnet-canny"), weights(tmp_path / "a" / "controlnet")
    assert any(not torch.equal(value, trained[name]) for name, value in start.items())
    assert Image.open(tmp_path / "a" / "validation" / "step-00000004" / "pictures.png").size == (32, 32)
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["data"]["resolution"] == 16

    halves = (*common(tiny_model, eight_pictures, tmp_path / "b"), *FEW, *options)
    assert train("controlnet", *halves, "--steps", 2).exit_code == 0
    (tmp_path / "b" / "controlnet").rename(tmp_path / "b" / "half")
    resumed = train("controlnet", *halves)
    assert resumed.exit_code == 0, resumed.stderr
    assert "goes on from" in resumed.stderr
    again = weights(tmp_path / "b" / "controlnet")
    assert all(torch.equal(value, again[name]) for name, value in trained.items())
    other = train("controlnet", *halves, "--set", "loss.beta=2")
    assert other.exit_code == 2
    assert "beta" in other.stderr
    assert train("controlnet", *halves, "--no-resume").exit_code == 2


def test_a_probe_from_the_command_line_loads_and_is_tested_for_leaks(
    train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path
) -> None:
    options = ("--taps", "conv", "--set", "probe.output_scale=2")
    result = train("probe", *common(tiny_model, eight_pictures, tmp_path / "run"), *FEW, *options, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    probe = InnerControlProbe.from_pretrained(tmp_path / "run" / "probe")
    assert (probe.config.tap_kind, probe.config.condition, probe.config.output_scale) == ("conv", "canny", 2)
    assert [row["timestep"] for row in document["leak"]] == [0, 200, 400, 600, 800, 920, 999]
    assert set(document["leak"][0]) == {"timestep", "plain", "matched", "to_picture", "to_control", "chance"}
    leak = json.loads((tmp_path / "run" / "leak.json").read_text())
    assert (leak["pictures"], leak["rows"]) == (8, document["leak"])
    assert "controlnet-canny in 50% of the batches" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(name.startswith("t") and name.endswith("99") for name in rows[-1])

    aligned = train(
        "controlnet", *common(tiny_model, eight_pictures, tmp_path / "aligned"), *FEW, "--steps", 1,
        "--probe", tmp_path / "run" / "probe", "--controlnet", "scratch", "--set", "loss.alpha=0",
    )  # fmt: skip
    assert aligned.exit_code == 0, aligned.stderr
    assert f"read with {tmp_path / 'run' / 'probe'}" in aligned.stderr
    assert f"--probe {tmp_path / 'run' / 'probe'}" in aligned.stdout


def test_a_single_picture_trains_a_probe_without_a_leak_test(
    train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").write_bytes((eight_pictures / "0.png").read_bytes())
    (data / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "square"}')
    result = train(
        "probe", *common(tiny_model, data, tmp_path / "run"), "--controlnet", "none", "--steps", 1, "--batch-size", 2
    )
    assert result.exit_code == 0, result.stderr
    assert "No leak test" in result.stderr
    assert "the plain UNet only" in result.stderr


def test_a_dry_run_checks_everything_and_writes_nothing(
    train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path
) -> None:
    result = train("controlnet", *common(tiny_model, eight_pictures, tmp_path / "run"), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing was trained" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--cond", "hed"), 2, "has no ControlNet for hed"),
        (("--cond", "depth", "--controlnet", "scratch"), 2, "needs a probe for depth"),
        (
            ("--set", "data.resolution=24", "--set", "model.base=none"),
            1,
            "none is neither a file, nor a folder, nor a Hub id",
        ),
        (("--probe", "./missing"), 1, "./missing is neither a file, nor a folder, nor a Hub id"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_message(
    train: Train,
    tiny_model: Path,
    eight_pictures: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    result = train("controlnet", *common(tiny_model, eight_pictures, tmp_path / "run"), *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_and_a_probe_of_another_condition_are_refused(
    train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = train("probe", *common(tiny_model, tmp_path / "empty", tmp_path / "run"))
    assert result.exit_code == 2, result.stderr
    assert str(tmp_path / "empty") in result.stderr
    shutil.copytree(tiny_model / "probe-canny", tmp_path / "probe")
    config = tmp_path / "probe" / "config.json"
    config.write_text(config.read_text().replace('"canny"', '"depth"'))
    result = train("controlnet", *common(tiny_model, eight_pictures, tmp_path / "run"), "--probe", tmp_path / "probe")
    assert result.exit_code == 2
    assert "condition of probe and ControlNet differ: depth and canny" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_interruption_ends_with_its_exit_code(
    train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run.train", interrupted)
    assert train("probe", *common(tiny_model, eight_pictures, tmp_path / "run")).exit_code == 130


def test_odd_sizes_are_refused(train: Train, tiny_model: Path, eight_pictures: Path, tmp_path: Path) -> None:
    result = train(
        "probe", *common(tiny_model, eight_pictures, tmp_path / "run"), "--set", "data.resolution=20", "--dry-run"
    )
    assert result.exit_code == 2
    assert "multiple of 8" in result.stderr


def test_training_is_started_as_a_module_and_its_help_loads_no_torch() -> None:
    code = "import sys; from icexport.cli import main, train; assert 'torch' not in sys.modules"
    environment = os.environ | {"COLUMNS": "200"}
    for command in ([sys.executable, "-c", code], [sys.executable, "-m", "icexport", "train", "controlnet", "--help"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
    assert "--preset <innercontrol|controlnet++|finetune>" in result.stdout
