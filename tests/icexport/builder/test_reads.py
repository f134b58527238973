"""Each file is hashed once per build, each weight loaded at most twice, and a cache hit reads nothing it need not."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import icexport
from icexport.builder import build as build_module
from icexport.builder.options import BuildOptions, BuildSpec
from icexport.bundle.manifest import MANIFEST_NAME
from icexport.bundle.store import Bundle
from icexport.errors import CheckpointError, SchemaError
from icexport.graphs.stable_diffusion import GRAPH_NAMES
from icexport.host import files
from icexport.models import loading
from tests.steps import Told

HOUR_NS = 3600 * 10**9


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read to be hashed."""
    found: Counter[str] = Counter()
    sha256 = files.sha256

    def counted(path: Path) -> str:
        found[str(path)] += 1
        return sha256(path)

    monkeypatch.setattr(files, "sha256", counted)
    return found


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the weights of each folder were loaded."""
    found: Counter[str] = Counter()
    load, load_probe = loading._load, loading.load_probe

    def counted(kind: Any, name: str, part: Any, dtype: Any) -> Any:
        found[getattr(part, "folder", part).name] += 1
        return load(kind, name, part, dtype)

    def counted_probe(part: Any, dtype: Any) -> Any:
        found[getattr(part, "folder", part).name] += 1
        return load_probe(part, dtype)

    monkeypatch.setattr(loading, "_load", counted)
    monkeypatch.setattr(loading, "load_probe", counted_probe)
    return found


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that has been there for an hour."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    age(folder)
    return folder


def age(folder: Path) -> None:
    then = time.time_ns() - HOUR_NS
    for path in folder.rglob("*"):
        os.utime(path, ns=(then, then))


@pytest.mark.parametrize(
    "options",
    [
        {"backend": ["onnxruntime", "torch"]},
        {"backend": ["onnxruntime", "torch", "tensorrt-rtx"], "dtype": "fp16", "target_sm": (89,)},
    ],
    ids=["fp32", "fp16"],
)
def test_one_build(
    model: Path, tmp_path: Path, reads: Counter[str], loads: Counter[str], options: dict[str, Any]
) -> None:
    told, place = Told(), {"output": tmp_path / "b", "engine_store": tmp_path / "s"}
    bundle = icexport.build("canny", model=str(model), **place, **options, progress=told)

    weights = {"unet", "vae", "text_encoder", "controlnet-canny", "probe-canny"}
    if "dtype" not in options:  # the torch engines have folders of their own
        assert {name: loads[name] for name in weights} == dict.fromkeys(weights, 1)
    assert max(loads.values()) <= 2
    assert {path for path, count in reads.items() if count > 1} == set()
    # The files of the store are those of the bundle by other names, apart from its own notes.
    assert len(reads) == len(bundle.manifest.files) + len(bundle.manifest.source.files)
    Bundle(bundle.path).verify()
    names = tuple(bundle.manifest.graphs)
    half, plans = "dtype" in options, "tensorrt-rtx" in options["backend"]
    assert told.names == [
        "check the model",
        *(["draw a picture for its activations"] if half else []),
        *(f"{step} {name}" for name in names for step in ("export", "reference", "float16 range of")[: 2 + half]),
        "hash the files",
        *(f"tensorrt-rtx plan of {name}" for name in names if plans),
        *(f"parity {name}" for name in names),
    ]
    assert told.expected == len(told.names)
    drawing = [part[1:] for part in told.parts if part[0] == "draw a picture for its activations"]
    assert drawing == ([(1, 4), (2, 4), (3, 4), (4, 4)] if half else [])


def test_steps_without_probe_and_verification(model: Path) -> None:
    options = BuildOptions(str(model), probe="none", backends=["torch"], verify=False)
    assert build_module._steps(BuildSpec.of("canny", options)) == 2 + 4


class BuildBegunError(Exception):
    """A build has begun that would make another bundle."""


@pytest.fixture
def no_more_builds(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whatever is no cache hit raises ``BuildBegunError``: nobody waits for what it would write."""

    def refuse(*_: object) -> None:
        raise BuildBegunError

    return lambda: monkeypatch.setattr("icexport.builder.writer.write_bundle", refuse)


def test_a_cache_hit_reads_no_file_that_is_as_recorded(
    model: Path,
    tmp_path: Path,
    reads: Counter[str],
    no_more_builds: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"model": str(model), "backend": "torch", "output": tmp_path / "bundle", "verify": False}
    told = Told()
    icexport.build("canny", **options, progress=told)
    assert told.names == ["check the model", *(f"export {name}" for name in GRAPH_NAMES), "hash the files"]
    assert told.expected == len(told.names)
    no_more_builds()
    built = Bundle(tmp_path / "bundle").manifest
    assert built.stamps.source.keys() == built.source.files.keys()
    late = built.files.keys() - built.stamps.files.keys()
    reads.clear()

    assert icexport.build("canny", **options).path == tmp_path / "bundle"
    assert set(reads) == {str(tmp_path / "bundle" / name) for name in late}, "what the build wrote in its last second"

    reads.clear()
    icexport.build("canny", **options, check_hashes=True)
    assert len(reads) == len(built.files) + len(built.source.files)
    assert set(reads.values()) == {1}

    reads.clear()
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    os.utime(weights)
    assert icexport.build("canny", **options).manifest.key == built.key
    assert reads[str(weights)] == 1
    assert str(model / "unet" / "config.json") not in reads

    path = tmp_path / "bundle" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(SchemaError, match=r"schema version 2, from an older icexport.*icexport build --cond canny"):
        icexport.InnerControlPipeline.from_pretrained(path.parent)
    with caplog.at_level("INFO", "icexport"), pytest.raises(BuildBegunError):
        icexport.build("canny", **options)
    assert "from an older icexport" in caplog.text
    assert path.is_file(), "a build that fails leaves the older bundle"


def test_times_that_prove_nothing_are_not_trusted(
    model: Path, tmp_path: Path, reads: Counter[str], no_more_builds: Callable[[], None]
) -> None:
    """A file that was changed within a second of the recording, and one after which the clock was set back."""
    names = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    times = [time.time_ns(), time.time_ns() + HOUR_NS]

    def touch() -> None:
        for name, then in zip(names, times, strict=True):
            os.utime(model / name, ns=(then, then))

    touch()
    options: dict[str, Any] = {"model": str(model), "backend": "torch", "output": tmp_path / "bundle", "verify": False}
    bundle = icexport.build("canny", **options)
    no_more_builds()
    assert bundle.manifest.source.files.keys() - bundle.manifest.stamps.source.keys() == set(names)
    for name in names:
        reads.clear()
        before = (model / name).read_bytes()
        (model / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        touch()
        with pytest.raises(BuildBegunError):
            icexport.build("canny", **options)
        assert reads[str(model / name)] == 1
        (model / name).write_bytes(before)
        touch()
    assert icexport.build("canny", **options).manifest.key == bundle.manifest.key


def test_a_model_that_changes_while_it_is_read_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_vae

    def late(part: Any, dtype: Any) -> Any:
        found = load(part, dtype)
        os.utime(part.config_path)
        return found

    monkeypatch.setattr(loading, "load_vae", late)
    with pytest.raises(CheckpointError, match=r"changed while it was read: .*vae/config\.json.*build again"):
        icexport.build("canny", model=str(model), backend="torch", output=tmp_path / "bundle", verify=False)
    assert not (tmp_path / "bundle").exists()
