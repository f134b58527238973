"""``icexport build``, ``export`` and ``verify`` on a tiny model."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from icexport.builder import build as builder
from icexport.builder import writer
from icexport.bundle.records import parity_json
from icexport.bundle.store import Bundle
from icexport.cli import build as commands
from icexport.errors import ParityError
from icexport.gates import verify as verification
from tests.hashing import hash_files


def test_defaults_are_those_of_the_python_function() -> None:
    ours = {p.name: p.default for p in inspect.signature(commands.build).parameters.values()}
    theirs = {p.name: p.default for p in inspect.signature(builder.build).parameters.values()}
    assert {**ours, "backend": "auto", "target_sm": ()}.items() >= {
        k: v for k, v in theirs.items() if k in ours and k != "cond"
    }.items()
    assert set(theirs) - set(ours) == {"verify", "progress", "shapes", "workspace_mb", "plugins"}


def test_a_second_build_touches_nothing(icexport, tiny_model: Path, tiny_bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")}
    backends = ("--backend", "torch", "--backend", "onnxruntime")
    args = ("build", "--cond", "canny", "--model", tiny_model, "--output", tiny_bundle, *backends)
    run = icexport(*args, "--json")
    assert run.exit_code == 0, run.stderr
    (found,) = json.loads(run.stdout)["bundles"]
    assert found["cached"] is True
    assert found["key"] == Bundle(tiny_bundle).manifest.key
    assert {row["graph"] for row in found["graphs"]} == {"text_encoder", "controlnet", "unet", "probe", "vae_decoder"}
    assert all(row["passed"] and row["cosine"] > 0.999 for row in found["parity"])
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")} == before
    shown = icexport(*args)
    assert "up to date" in shown.stdout
    assert found["key"] in shown.stdout
    assert "vae_decoder" in shown.stdout


class Fake:
    """Stands in for ``builder.build``: writes nothing, remembers what it was asked for."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = Bundle(bundle)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, cond: str, **options: Any) -> Bundle:
        print("chatter of a library")  # noqa: T201
        options.pop("progress")("export unet")
        self.calls.append({"cond": cond, **options})
        return self.bundle


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> Fake:
    fake = Fake(tiny_bundle)
    monkeypatch.setattr(builder, "build", fake)
    return fake


def test_every_option_arrives(icexport, fake: Fake) -> None:
    run = icexport(
        *("build", "--cond", "canny", "--model", "m", "--controlnet", "c", "--probe", "p", "--backend", "torch"),
        *(
            "--backend",
            "onnxruntime",
            "--dtype",
            "fp16",
            "--height",
            "64:64:128",
            "--width",
            "64",
            "--batch-size",
            "2",
        ),
        *("--opset", "20", "--output", "o", "--force", "--check-hashes", "--no-verify", "--no-preflight"),
        *("--target-sm", "86", "89", "--target-sm", "120", "--optimization-level", "1", "--workspace", "64"),
        *("--no-plugins", "--engine-store", "s", "--shape", "64x64", "--shape", "64x128"),
        *("--vae", "v", "--variant", "fp16", "--model-config", "mc", "--text-length", "77:77:231"),
    )
    assert run.exit_code == 0, run.stderr
    wanted = {"cond": "canny", "model": "m", "controlnet": "c", "probe": "p", "backend": ["torch", "onnxruntime"]}
    wanted |= {"dtype": "fp16", "height": "64:64:128", "width": "64", "batch_size": "2", "opset": 20}
    wanted |= {"target_sm": [86, 89, 120], "optimization_level": 1, "workspace_mb": 64, "plugins": False}
    wanted |= {"vae": "v", "variant": "fp16", "model_config": "mc", "text_length": "77:77:231"}
    wanted |= {"engine_store": Path("s"), "shapes": ["64x64", "64x128"]}
    wanted |= {"output": Path("o"), "force": True, "check_hashes": True, "verify": False, "preflight": False}
    assert fake.calls == [wanted]
    assert "export unet" in run.stderr


def test_json_is_alone_on_stdout(icexport, fake: Fake) -> None:
    run = icexport("build", "--cond", "canny", "--json")
    assert json.loads(run.stdout)["bundles"][0]["cached"] is False
    assert "chatter" in run.stderr


@pytest.mark.parametrize(
    ("args", "folders"),
    [
        (("build", "--cond", "canny"), ["builds/canny"]),
        (("build", "--cond", "canny", "--output", "o"), ["o"]),
        (("build", "--cond", "canny", "--cond", "hed", "--cond", "canny"), ["builds/canny", "builds/hed"]),
        (("build", "--cond", "canny", "--cond", "hed", "--output", "o"), ["o/canny", "o/hed"]),
        (("export", "--cond", "canny"), ["exports/canny"]),
    ],
)
def test_folders(icexport, fake: Fake, args: tuple[str, ...], folders: list[str]) -> None:
    run = icexport(*args)
    assert run.exit_code == 0, run.stderr
    assert [call["output"] for call in fake.calls] == [Path(folder) for folder in folders]
    assert {call["verify"] for call in fake.calls} == {args[0] == "build"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--cond", "canny", "--cond", "hed", "--probe", "p"), "--probe belongs to one condition"),
        (("--cond", "canny", "--cond", "sobel"), "canny, hed, lineart, depth"),
    ],
)
def test_conditions_are_checked_before_anything_is_built(icexport, fake: Fake, args, message: str) -> None:
    run = icexport("build", *args)
    assert run.exit_code == 2
    assert message in run.stderr
    assert fake.calls == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--cond", "sobel"), "canny, hed, lineart, depth"),
        (("--height", "17"), "multiples of"),
        (("--height", "big"), "Cannot read the size"),
        (("--batch-size", "4:2:1"), "min <= opt <= max"),
        (("--opset", "9"), "choose one of"),
        (("--probe", "none", "--controlnet", "/no/such/folder"), "neither a file, nor a folder, nor a Hub id"),
    ],
)
def test_wrong_values_change_nothing(icexport, tiny_model: Path, tmp_path: Path, args, message: str) -> None:
    cond = () if "--cond" in args else ("--cond", "canny")
    run = icexport("build", *cond, "--model", tiny_model, "--output", tmp_path / "b", *args)
    assert run.exit_code == (1 if "--controlnet" in args else 2)
    assert message in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_the_earlier_bundle(
    icexport, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "canny"
    shutil.copytree(tiny_bundle, folder)
    before = hash_files(folder)

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "export_graph", interrupted)
    run = icexport("build", "--cond", "canny", "--model", tiny_model, "--output", folder, "--force")
    assert run.exit_code == 130
    assert "Interrupted" in run.stderr
    assert hash_files(folder) == before
    Bundle(folder).verify()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_verify_tells_what_failed(icexport, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    good = parity_json(Bundle(tiny_bundle).manifest.parity)
    bad = json.loads(json.dumps(good))
    bad["onnxruntime"]["unet"]["noise_pred"] |= {"passed": False, "relative_error": float("inf")}

    def failing(*_args: object, **_options: object) -> None:
        raise ParityError("Parity failed. unet.noise_pred", bad)

    monkeypatch.setattr(verification, "verify", failing)
    run = icexport("verify", tiny_bundle, "--json")
    assert run.exit_code == 3
    assert "unet.noise_pred" in run.stderr
    document = json.loads(run.stdout)
    assert document["passed"] is False
    assert document["parity"]["onnxruntime"]["unet"]["noise_pred"]["relative_error"] is None

    monkeypatch.setattr(verification, "verify", lambda *_args, **_options: good)
    run = icexport("verify", tiny_bundle)
    assert run.exit_code == 0
    assert "passed: yes" in run.stdout


def test_verify_refuses_another_model(icexport, tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    run = icexport("verify", tiny_bundle, "--model", other)
    assert run.exit_code == 1
    assert "scheduler/scheduler_config.json" in run.stderr
