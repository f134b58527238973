from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import icexport
from engines.errors import OutOfMemoryError
from icexport.backends import table
from icexport.backends.base import EngineRequest, PlanOptions, make_engine
from icexport.backends.torch_modules import save_torch
from icexport.builder import build as builder
from icexport.builder import preflight, writer
from icexport.builder.options import BuildOptions, BuildSpec
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.records import GraphEntry, parity_json
from icexport.bundle.store import Bundle
from icexport.errors import BundleError, CheckpointError, UsageError
from icexport.export.onnx import export_graph
from icexport.graphs.split import split
from icexport.graphs.stable_diffusion import probe_graph, unet_graph
from icexport.host.files import Hashes
from icexport.models.source import ModelSource
from icexport.progress import silent
from tests.hashing import hash_files

BACKENDS = ["onnxruntime", "torch"]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "write_bundle", lambda *_: pytest.fail("started the long work"))


def test_contents(tiny_bundle: Path, tiny_model: Path) -> None:
    bundle = Bundle(tiny_bundle)
    manifest = bundle.manifest
    bundle.verify()

    assert list(manifest.graphs) == ["text_encoder", "controlnet", "unet", "probe", "vae_decoder"]
    found = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert found == {*manifest.files, "icexport.json"}
    assert {(e.graph, e.backend) for e in manifest.engines.values()} == {
        (graph, backend) for graph in manifest.graphs for backend in BACKENDS
    }
    assert manifest.condition.name == "canny"
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.source.files == ModelSource.find("canny", str(tiny_model)).files
    assert manifest.fidelity is None
    assert json.loads((tiny_bundle / "reports" / "parity.json").read_text()) == parity_json(manifest.parity)
    for backend in BACKENDS:
        for graph, entry in manifest.graphs.items():
            outputs = manifest.parity[backend][graph]
            assert list(outputs) == [output.name for output in entry.outputs]
            assert all(result.passed for result in outputs.values())
    assert manifest.graphs["unet"].dtypes["float"] > 10_000


def test_nothing_tells_where_it_was_built(tiny_bundle: Path, tiny_model: Path) -> None:
    """Only the manifest names the source, as it was given."""
    needles = [str(tiny_model).encode(), str(Path(builder.__file__).parents[1]).encode(), b"site-packages", b".py"]
    for path in tiny_bundle.rglob("*"):
        if path.is_file() and path.name != "icexport.json" and path.parent.name != "tokenizer":
            content = path.read_bytes()
            assert not [needle for needle in [*needles, b"stack_trace"] if needle in content], path


def test_an_identical_build_touches_nothing(tiny_bundle: Path, tiny_model: Path, no_work: None) -> None:
    before, started = times(tiny_bundle), time.perf_counter()

    bundle = icexport.build("canny", model=str(tiny_model), backend=BACKENDS, output=tiny_bundle)

    assert time.perf_counter() - started < 5
    assert times(tiny_bundle) == before
    assert bundle.manifest.key == Bundle(tiny_bundle).manifest.key


def test_an_identical_build_needs_no_torch(tiny_model: Path, tmp_path: Path) -> None:
    """Importing torch takes longer than the rest of it."""
    output = tmp_path / "bundle"
    icexport.build("canny", model=str(tiny_model), backend="onnxruntime", verify=False, output=output)
    code = """if True:
        import sys
        from icexport.cli.main import main
        try:
            main()
        finally:
            found = sorted({"torch", "diffusers", "transformers", "onnx"} & sys.modules.keys())
            print(f"imported: {found}", file=sys.stderr)
    """
    options = ["--model", tiny_model, "--backend", "onnxruntime", "--no-verify", "--output", output]
    command = [sys.executable, "-c", code, "build", "--cond", "canny", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "imported: []" in done.stderr, done.stderr
    assert "up to date" in done.stdout


@pytest.mark.parametrize("change", ["damage", "option", "force"])
def test_damaged_or_other_bundles_are_built_again(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    class StartedError(Exception):
        pass

    def start(*_args: Any) -> None:
        raise StartedError

    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = times(copy)
    monkeypatch.setattr(writer, "write_bundle", start)
    options: dict[str, Any] = {"option": {"opset": 22}, "force": {"force": True}}.get(change, {})
    if change == "damage":
        (copy / "graphs" / "probe.onnx").unlink()
        before = times(copy)

    with pytest.raises(StartedError):
        icexport.build("canny", model=str(tiny_model), backend=BACKENDS, output=copy, **options)

    assert times(copy) == before


@pytest.mark.slow
def test_forced_builds_are_identical(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "export_graph", export_graph)  # not what tests share
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = times(copy / "graphs")

    bundle = icexport.build("canny", model=str(tiny_model), backend=BACKENDS, output=copy, force=True)

    assert not times(copy / "graphs").items() & before.items()
    first = Bundle(tiny_bundle).manifest
    assert bundle.manifest.files == first.files
    assert bundle.manifest.engines == first.engines
    assert bundle.manifest.key == first.key


def test_exports_are_identical(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The smallest graph again; the slow test above has all of them."""
    source = ModelSource.find("canny", str(tiny_model))
    manifest = Bundle(tiny_bundle).manifest
    graph = next(split(source, torch.float32))
    export_graph(graph, tmp_path / "text_encoder.onnx", manifest.profile.symbols(4))

    for name in ("text_encoder.onnx", "text_encoder.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tiny_bundle / "graphs" / name).read_bytes()


def test_weights_for_torch_are_identical(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource.find("canny", str(tiny_model))
    probe, unet = source.probe_model(torch.float32), source.unet(torch.float32)
    assert probe is not None
    for graph in (probe_graph(probe, unet, torch.float32), unet_graph(unet, 12, probe.config, torch.float32)):
        for number in range(8):  # what is random may be equal by chance
            save_torch(graph, tmp_path / graph.name / str(number))
        first, *others = (hash_files(folder) for folder in (tmp_path / graph.name).iterdir())
        assert all(other == first for other in others)


def test_two_controlnets_of_one_architecture_have_two_engines(tiny_bundle: Path, tmp_path: Path) -> None:
    """Their .onnx files are equal, only the weights beside them differ."""
    manifest = Bundle(tiny_bundle).manifest
    copy = Path(shutil.copytree(tiny_bundle / "graphs", tmp_path / "graphs")).parent

    def key() -> str:
        request = EngineRequest(
            graph="controlnet",
            entry=GraphEntry("graphs/controlnet.onnx", (), (), {}),
            folder=copy,
            dtype="fp32",
            profile=manifest.profile,
            multiple=4,
            options=PlanOptions(),
            store=EngineStore(tmp_path / "store"),
            hashes=Hashes(),
            progress=silent,
        )
        (found,) = make_engine(table.get("onnxruntime"), request)
        return found

    assert manifest.engines[key()].graph == "controlnet"
    data = bytearray((copy / "graphs/controlnet.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "graphs/controlnet.onnx.data").write_bytes(data)
    assert key() not in manifest.engines


def test_missing_and_damaged_weights_are_found_first(tiny_model: Path, tmp_path: Path, no_work: None) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])

    with pytest.raises(CheckpointError, match="vae.*cut short"):
        icexport.build("canny", model=str(model), output=tmp_path / "bundle")

    assert not (tmp_path / "bundle").exists()


def test_weights_that_are_not_there(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "text_encoder" / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"text_encoder has no weights: no \.safetensors file"):
        icexport.build("canny", model=str(model), output=tmp_path / "bundle")

    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_no_probe_is_a_usage_error(tiny_model: Path, tmp_path: Path, no_work: None) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.rmtree(model / "probe-canny")

    with pytest.raises(UsageError, match="No probe for 'canny'.*--probe none"):
        icexport.build("canny", model=str(model), output=tmp_path / "bundle")


def test_a_full_disk_is_found_first(
    tiny_model: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1_000_000))

    with pytest.raises(BundleError, match=r"has 0\.0 GB free; this bundle needs about .*Nothing was changed"):
        icexport.build("canny", model=str(tiny_model), output=tmp_path / "bundle")

    assert not (tmp_path / "bundle").exists()


def test_too_little_memory_is_found_first(
    tiny_model: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available", lambda: 500_000_000)
    options: dict[str, Any] = {"model": str(tiny_model), "output": tmp_path / "bundle", "backend": "onnxruntime"}

    with pytest.raises(OutOfMemoryError, match=r"takes about 0\.8 GB of memory, and 0\.5 GB are free.*--no-preflight"):
        icexport.build("canny", **options)

    assert not (tmp_path / "bundle").exists()
    with pytest.raises(pytest.fail.Exception, match="started the long work"):
        icexport.build("canny", **options, preflight=False)


def test_what_a_build_takes_is_told_before_the_work(
    tiny_model: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "convolution_rate", lambda: 1e6)
    with caplog.at_level("INFO"), pytest.raises(pytest.fail.Exception, match="started the long work"):
        icexport.build("canny", model=str(tiny_model), backend="onnxruntime", output=tmp_path / "bundle")

    told = re.search(r"takes about (\d+) minutes here, 0\.8 GB of memory .* and 0\.0 GB of disk", caplog.text)
    assert told, caplog.text
    assert int(told[1]) > 2, "most of it on so slow a machine"


def test_larger_pictures_and_models_need_more(tiny_model: Path) -> None:
    def needed(**options: Any) -> float:
        found = BuildOptions(model=str(tiny_model), backends=["onnxruntime"], **options)
        spec = BuildSpec.of("canny", found)
        memory = preflight.memory_needed(spec, dict.fromkeys(("unet", "controlnet", "vae"), 10**9))
        assert memory is not None
        return memory

    usual, taller, tallest = needed(), needed(height=32), needed(height=48)
    assert 4e9 < usual < taller
    assert tallest - taller == pytest.approx(taller - usual)
    assert needed(batch_size=8) == pytest.approx(taller), "4 pictures twice as high, or twice as many"
    assert needed(verify=False) < 1e9


def test_a_failure_in_the_middle_leaves_the_bundle(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = times(copy)

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "export_graph", full)
    with pytest.raises(BundleError, match="No space left on device.*earlier bundle is untouched"):
        icexport.build("canny", model=str(tiny_model), backend=BACKENDS, output=copy, force=True)

    assert times(copy) == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["bundle"]


def test_a_probeless_bundle(dynamic_bundle: Path) -> None:
    manifest = Bundle(dynamic_bundle).manifest

    assert list(manifest.graphs) == ["text_encoder", "controlnet", "unet", "vae_decoder"]
    assert [output.name for output in manifest.graphs["unet"].outputs] == ["noise_pred", "time_embedding"]
    assert "probe" not in manifest.configs
    engines = sorted(path.name for path in dynamic_bundle.glob("engines/*/*"))
    assert engines == ["controlnet.onnx", "unet.onnx", "vae_decoder.onnx"], "attention as one node; no weights"
