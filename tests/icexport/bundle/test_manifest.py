from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import TensorSpec
from icexport.backends.base import key_parts
from icexport.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest
from icexport.bundle.records import ConditionInfo, EngineEntry, GraphEntry, ParityResult, SourceInfo, Stamps
from icexport.errors import BundleError, DamagedBundleError, SchemaError
from icexport.graphs.graph import describe, specs
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.shapes import TensorInfo
from icexport.host.files import Stamp, digest

SAMPLE = TensorInfo("sample", "float32", ("samples", 4, "8*rows"))
PROFILE = Profile(SizeRange(1, 1, 4), SizeRange(64, 64, 64), SizeRange(64, 96, 128))


def make(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "key": "k",
        "condition": ConditionInfo("canny", (0.0, 1.0), "white edges on black", "edge F1", "ratio", True),
        "source": SourceInfo("stable-diffusion", "m", None, "none", {"unet/config.json": "2" * 64}),
        "dtype": "fp32",
        "opset": 21,
        "profile": PROFILE,
        "graphs": {"unet": GraphEntry("graphs/unet.onnx", (SAMPLE,), (SAMPLE,), {"float": 3}, plugins=("a::b",))},
        "configs": {"unet": {"in_channels": 4}},
        "engines": {"abc": EngineEntry("unet", "torch", "2", ["engines/abc/config.json"], made_from={"graph": "0"})},
        "files": {"graphs/unet.onnx": "0" * 64, "engines/abc/config.json": "1" * 64},
        "tolerances": {"cosine": 0.999},
        "parity": {"torch": {"unet": {"y": ParityResult(True, 1.0, 0.0, None, "1x64x64", True)}}},
        "versions": {"icexport": "0"},
        "stamps": Stamps({"unet/config.json": Stamp(1, 2, 3)}, {"graphs/unet.onnx": Stamp(4, 5, 6)}),
    }
    return Manifest(**(values | changes))


def change(folder: Path, edit: Any) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    edit(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_round_trip(tmp_path: Path) -> None:
    make().write(tmp_path)

    assert Manifest.read(tmp_path) == make()


def test_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle: .*icexport build"):
        Manifest.read(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        Manifest.read(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="is not a bundle"):
        Manifest.read(tmp_path / "file")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00"])
def test_not_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text)

    with pytest.raises(DamagedBundleError, match=r"icexport\.json is damaged"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_newer_schema(tmp_path: Path, version: int) -> None:
    make(schema_version=version).write(tmp_path)

    with pytest.raises(SchemaError, match=f"schema version {version}; .* up to {SCHEMA_VERSION}.* Upgrade"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_schema_names_the_command_that_builds_the_bundle_again(tmp_path: Path, version: int) -> None:
    make(schema_version=version).write(tmp_path)

    with pytest.raises(SchemaError, match=f"schema version {version}, from an older icexport") as caught:
        Manifest.read(tmp_path)

    command = str(caught.value).partition("Build the bundle again: ")[2].split()
    assert command[:2] == ["icexport", "build"]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options == {
        "--cond": "canny",
        "--model": "m",
        "--probe": "none",
        "--backend": "torch",
        "--dtype": "fp32",
        "--height": "64",
        "--width": "64:96:128",
        "--batch-size": "1:1:4",
        "--output": str(tmp_path),
    }


def test_an_older_schema_that_is_damaged_is_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"schema_version": 2}))

    with pytest.raises(SchemaError, match="older icexport.*icexport build --output"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("data", [[], "text", {}, {"schema_version": "1"}, {"schema_version": True}])
def test_not_a_manifest(tmp_path: Path, data: object) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))

    with pytest.raises(SchemaError, match="schema_version"):
        Manifest.read(tmp_path)


def test_missing_fields_are_all_named(tmp_path: Path) -> None:
    make().write(tmp_path)
    change(tmp_path, lambda data: [data.pop("graphs"), data.pop("opset")])

    with pytest.raises(SchemaError, match="lacks: graphs, opset"):
        Manifest.read(tmp_path)


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    make().write(tmp_path)
    change(tmp_path, lambda data: data.update(note="from a later minor version"))

    assert Manifest.read(tmp_path) == make()


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["graphs/unet.onnx", "engines/abc/config.json"]},
        {"files": {1: "x"}, "graphs": [], "engines": {}},
        {"graphs": {"unet": {"file": "graphs/unet.onnx"}}},
        {"graphs": {"unet": {"file": 3, "inputs": [], "outputs": [], "dtypes": {}, "plugins": []}}},
        {"profile": {"batch": {"min": 1, "opt": 1, "max": 1}}},
        {"profile": {axis: {"min": 4, "opt": 1, "max": 1} for axis in ("batch", "height", "width")}},
        {"profile": {axis: {"min": "a", "opt": "b", "max": "c"} for axis in ("batch", "height", "width")}},
        {"engines": {"abc": {"graph": "unet"}}},
    ],
)
def test_fields_of_a_wrong_form(tmp_path: Path, changes: dict[str, Any]) -> None:
    make().write(tmp_path)
    change(tmp_path, lambda data: data.update(changes))

    with pytest.raises(SchemaError, match="does not follow schema version"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "graphs/../../x", "graphs\\x", "C:/x", "", "graphs/\0x"])
@pytest.mark.parametrize("where", ["files", "graph", "engine"])
def test_paths_that_leave_the_folder(tmp_path: Path, path: str, where: str) -> None:
    make().write(tmp_path)

    def edit(data: dict[str, Any]) -> None:
        data["files"][path] = "0" * 64
        if where == "graph":
            data["graphs"]["unet"]["file"] = path
        if where == "engine":
            data["engines"]["abc"]["files"] = [path]

    change(tmp_path, edit)

    with pytest.raises(SchemaError, match="names paths outside the bundle: .*Do not use"):
        Manifest.read(tmp_path)


def test_every_used_file_needs_a_hash(tmp_path: Path) -> None:
    make(files={}).write(tmp_path)

    with pytest.raises(SchemaError, match=r"without a hash: engines/abc/config\.json, graphs/unet\.onnx"):
        Manifest.read(tmp_path)


def test_specs_survive_the_manifest() -> None:
    found = TensorSpec("sample", torch.float16, ("samples", 4, "2*rows", "columns"))

    assert specs(describe([found])) == (found,)


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


PARTS: dict[str, Any] = {
    "graph_hash": "a" * 64,
    "weights_hash": "b" * 64,
    "profile": PROFILE,
    "dtype": "fp16",
    "backend": "tensorrt",
    "version": "10.9",
    "device": "NVIDIA L4 sm_89",
    "kernels": "c" * 64,
    "options": {"optimization_level": 3, "workspace_bytes": 1 << 30},
}


def key(**changes: Any) -> str:
    return digest(key_parts(**{**PARTS, **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"graph_hash": "d" * 64},
        {"weights_hash": "d" * 64},
        {"weights_hash": ""},
        {"profile": replace(PROFILE, batch=SizeRange(1, 2, 4))},
        {"profile": replace(PROFILE, height=SizeRange(64, 64, 128))},
        {"profile": replace(PROFILE, width=SizeRange(64, 64, 128))},
        {"profile": replace(PROFILE, shapes=((64, 96), (64, 128)))},
        {"dtype": "fp32"},
        {"backend": "tensorrt-rtx"},
        {"version": "10.10"},
        {"device": "NVIDIA L4 sm_90"},
        {"kernels": ""},
        {"kernels": "d" * 64},
        {"options": {"optimization_level": 5, "workspace_bytes": 1 << 30}},
        {"options": {"optimization_level": 3, "workspace_bytes": 1 << 31}},
        {"options": {"optimization_level": 3, "workspace_bytes": None}},
        {"options": {"optimization_level": 3}},
        {"options": {**PARTS["options"], "more": 1}},
        {"options": None},
        {"graph_hash": "b" * 64, "weights_hash": "a" * 64},
        {"weights_hash": "c" * 64, "kernels": "b" * 64},
    ],
    ids=str,
)
def test_whatever_changes_an_engine_changes_its_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()


def test_no_two_ingredients_are_taken_for_one_another() -> None:
    """The same text in the place of another ingredient is another engine."""
    texts = [name for name, value in PARTS.items() if isinstance(value, str)]
    none = dict.fromkeys(texts, "")
    assert len({key(**none), *(key(**{**none, name: "x"}) for name in texts)}) == 1 + len(texts) == 8


def test_an_engine_made_of_the_same_has_the_same_key() -> None:
    same = {**PARTS, "options": dict(reversed(PARTS["options"].items())), "profile": replace(PROFILE)}
    assert digest(key_parts(**same)) == key()
    assert key(options=None) == key(options={})
