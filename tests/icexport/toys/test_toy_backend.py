"""A backend is one object: this one is registered from outside, and nothing else in the project knows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import icexport
from engines.base import Availability
from engines.errors import BackendUnavailableError
from engines.onnxruntime import OnnxRuntimeEngine
from icexport.backends import table
from icexport.backends.base import Backend, EngineRequest, Made
from icexport.backends.engines import load_engine
from icexport.bundle.records import EngineEntry
from icexport.bundle.store import Bundle
from icexport.cli.main import app
from icexport.errors import BundleError, DamagedBundleError, UsageError


class Toy(Backend):
    """Keeps each graph as one file, with a serial number of the machine that it was made on."""

    name = "toy"
    summary = "a toy"
    dtypes = ("fp32",)
    usable, serial = True, "0001"

    def check(self) -> Availability:
        if self.usable:
            return Availability(True, "1.0", "", "", ("cpu",))
        return Availability(False, None, "the toy is broken", "Buy another one", ())

    def target(self, options: object) -> str:
        return self.serial

    def make(self, request: EngineRequest, made: Made) -> EngineEntry:
        file = f"engines/{made.key}/{request.graph}.onnx"
        (request.folder / file).parent.mkdir(parents=True)
        shutil.copyfile(made.onnx, request.folder / file)
        shutil.copyfile(f"{made.onnx}.data", request.folder / f"{file}.data")
        return EngineEntry(request.graph, self.name, "1.0", [file, f"{file}.data"], self.serial, made.parts)

    def refusal(self, bundle: Bundle, key: str, entry: EngineEntry, device: object) -> str:
        return "" if entry.device == self.serial else f"it was built for toy {entry.device}, and this is {self.serial}"

    def open(
        self, bundle: Bundle, key: str, entry: EngineEntry, device: Any, scratch: Any = None
    ) -> OnnxRuntimeEngine:
        bundle.verify(entry.files)
        return OnnxRuntimeEngine(entry.graph, bundle.path / entry.files[0], device)


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    table.register(Toy())
    yield
    del table.BACKENDS["toy"]


@pytest.fixture(scope="module")
def bundle(toy: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "canny"
    icexport.build("canny", model=str(tiny_model), backend="toy", output=folder)
    return folder


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app(list(map(str, args)), prog_name="icexport")
    return int(ended.value.code or 0)


def test_it_builds_and_is_verified(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    assert {entry.backend for entry in manifest.engines.values()} == {"toy"}
    assert {entry.made_from["device"] for entry in manifest.engines.values()} == {"0001"}
    assert manifest.parity.keys() == {"toy"}
    assert icexport.verify(bundle)["toy"].keys() == manifest.graphs.keys()


def test_it_draws_what_the_others_draw(bundle: Path, tiny_bundle: Path) -> None:
    pictures = []
    for folder in (bundle, tiny_bundle):
        pipe = icexport.InnerControlPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe("a", torch.zeros(1, 3, 16, 16), generator=generator, **options).images)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)  # the toy runs attention as it was exported


def test_the_command_line_knows_it(
    bundle: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = "--control-map", "docs/images/apple.png"
    code = run("generate", bundle, "--prompt", "a", *control, "--steps", "1", "--output", tmp_path / "a.png", "--json")
    assert (code, json.loads(capsys.readouterr().out)["settings"]["backend"]) == (0, "toy")
    assert run("inspect", bundle) == 0
    assert "toy" in capsys.readouterr().out
    assert run("doctor") == 0
    assert "toy" in capsys.readouterr().out


def test_it_is_refused_cleanly(bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UsageError, match="--dtype fp16: backend toy takes fp32"):
        icexport.build("canny", model=str(tiny_model), backend="toy", dtype="fp16", output=tmp_path / "b")
    with pytest.raises(BackendUnavailableError, match=r"device 'cuda' here: toy \(it runs on cpu here\)"):
        load_engine(Bundle(bundle), "unet", device="cuda")
    monkeypatch.setattr(Toy, "serial", "0002")
    with pytest.raises(BundleError, match=r"toy engine of unet .*built for toy 0001.*icexport build .*--backend toy"):
        load_engine(Bundle(bundle), "unet", "toy")
    monkeypatch.setattr(Toy, "usable", False)
    with pytest.raises(BackendUnavailableError, match=r"the toy is broken\. Buy another one"):
        icexport.build("canny", model=str(tiny_model), backend="toy", output=tmp_path / "b")
    with pytest.raises(BackendUnavailableError, match="the toy is broken"):
        load_engine(Bundle(bundle), "unet")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_engine_is_not_opened(bundle: Path, tmp_path: Path) -> None:
    copy = Bundle(shutil.copytree(bundle, tmp_path / "copy"))
    (entry,) = (e for e in copy.manifest.engines.values() if e.graph == "probe")
    (copy.path / entry.files[1]).write_bytes(b"x")
    with pytest.raises(DamagedBundleError, match="probe.onnx.data was changed"):
        load_engine(copy, "probe")
