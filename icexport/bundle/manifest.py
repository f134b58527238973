"""The manifest ``icexport.json``: what a bundle holds, what it was made from, and how well it matched."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from icexport.bundle.records import (
    ConditionInfo,
    EngineEntry,
    GraphEntry,
    Parity,
    SourceInfo,
    Stamps,
    parity_from_json,
)
from icexport.errors import BundleError, DamagedBundleError, SchemaError, UsageError
from icexport.graphs.profile import Profile
from icexport.graphs.shapes import TensorInfo
from icexport.host.files import Stamp

MANIFEST_NAME = "icexport.json"
PROBE_FOLDER = "probe"
"""Where a bundle keeps the weights of its probe, for kernels that no engine holds."""
SCHEMA_VERSION = 4
"""1: the first. 2: engines say what they were built for, graphs have float32 islands and a twin with plugins, and
profiles may list sizes. 3: shapes are in ``samples``, ``pictures``, ``rows`` and ``columns``; every engine says what
it was made from, and files have stamps. Older bundles have to be built again."""


@dataclass
class Manifest:
    """Everything that a bundle says of itself.

    Attributes:
        key: hash of everything that the bundle was made from; equal keys mean equal bundles.
        condition: what the control maps show.
        source: the model that the bundle was made from.
        dtype: name of the precision.
        opset: ONNX opset of the graphs.
        profile: allowed pictures per call and sizes in pixels.
        graphs: graphs by name.
        configs: diffusers' and the probe's configs, by component; that of the scheduler, too.
        engines: engines by key.
        files: SHA-256 of every file of the bundle but the manifest, by POSIX path.
        tolerances: tolerances of the parity gate.
        parity: results of the parity gate; empty where it was skipped.
        versions: versions of icexport and of the libraries that made the bundle.
        stamps: stamps by which unchanged files are known without reading them.
        fidelity: results of the fidelity gate; None where it has not run.
    """

    key: str
    condition: ConditionInfo
    source: SourceInfo
    dtype: str
    opset: int
    profile: Profile
    graphs: dict[str, GraphEntry]
    configs: dict[str, dict[str, Any]]
    engines: dict[str, EngineEntry]
    files: dict[str, str]
    tolerances: dict[str, float]
    parity: Parity
    versions: dict[str, str]
    stamps: Stamps = field(default_factory=lambda: Stamps({}, {}))
    fidelity: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def train_timesteps(self) -> int:
        """Number of timesteps of the noise schedule that the model was trained with."""
        return int(self.configs["scheduler"].get("num_train_timesteps", 1000))

    def write(self, folder: Path) -> None:
        """Write ``icexport.json`` into ``folder``."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a bundle; no other file is touched.

        Raises:
            BundleError: there is no bundle in ``folder``.
            SchemaError: the manifest has another schema version, lacks a field, or has a path that leaves the folder.
            DamagedBundleError: the manifest is not JSON.
        """
        path = folder / MANIFEST_NAME
        try:
            data = _parsed(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST_NAME}. Make one with: icexport build --cond canny "
                f"--output {folder}"
            ) from error
        _check_version(data, path)
        return cls._from_json(data, path)

    @classmethod
    def _from_json(cls, data: dict[str, Any], path: Path) -> Manifest:
        known = {f.name for f in fields(cls)}
        missing = sorted(known - data.keys())
        if missing:
            raise SchemaError(f"{path} lacks: {', '.join(missing)}. Build the bundle again.")
        try:
            values = {name: data[name] for name in known}
            values["condition"] = _condition(values["condition"])
            values["source"] = SourceInfo(**values["source"])
            values["profile"] = Profile.from_json(values["profile"])
            values["graphs"] = {n: _graph(g) for n, g in values["graphs"].items()}
            values["engines"] = {n: EngineEntry(**e) for n, e in values["engines"].items()}
            values["parity"] = parity_from_json(values["parity"])
            values["stamps"] = _stamps(values["stamps"])
            manifest = cls(**values)
            used = [f for g in manifest.graphs.values() for f in (g.file, g.plugin_file) if f is not None]
            used += [f for e in manifest.engines.values() for f in e.files]
            check_paths([*manifest.files, *used], path)
            unlisted = sorted(set(used) - manifest.files.keys())
        except (TypeError, AttributeError, KeyError, UsageError) as error:
            raise SchemaError(f"{path} does not follow schema version {SCHEMA_VERSION}: {error}.") from error
        if unlisted:
            raise SchemaError(f"{path} uses files without a hash: {', '.join(unlisted)}. Build the bundle again.")
        return manifest

    def rebuild_command(self, folder: Path, backends: Iterable[str]) -> str:
        """Return the command that rebuilds this bundle's engines, for these backends, on the machine where it runs."""
        return rebuild_command(asdict(self), folder, backends)


def engine_keys(folder: Path) -> set[str]:
    """Return the keys of the engines of a bundle of any schema version up to this one.

    Raises:
        OSError: the manifest is not there, or cannot be read.
        SchemaError: the manifest is of a newer schema version, or no manifest.
        DamagedBundleError: the manifest is not JSON.
    """
    path = folder / MANIFEST_NAME
    data = _parsed(path)
    version = _version(data, path)
    engines = data.get("engines") if version <= SCHEMA_VERSION else None
    if not isinstance(engines, dict):
        raise SchemaError(f"{path} does not say which engines it uses. Build the bundle again, or remove it.")
    return set(engines)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedBundleError(f"{path} is damaged: {error}. Build the bundle again.") from error


def _version(data: Any, path: Path) -> int:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int:
        raise SchemaError(f"{path} has no schema_version: it is not a manifest of icexport.")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path} has schema version {version}; this icexport reads up to {SCHEMA_VERSION}. Upgrade icexport."
        )
    return version


def _check_version(data: Any, path: Path) -> None:
    version = _version(data, path)
    if version < SCHEMA_VERSION:
        try:
            backends = dict.fromkeys(engine["backend"] for engine in data["engines"].values())
            command = rebuild_command(data, path.parent, backends)
        except (AttributeError, KeyError, TypeError, UsageError):  # damaged, too
            command = f"icexport build --output {path.parent}, with the options of then"
        raise SchemaError(
            f"{path} has schema version {version}, from an older icexport; this one reads {SCHEMA_VERSION}. Build the "
            f"bundle again: {command}"
        )


def rebuild_command(data: Mapping[str, Any], folder: Path, backends: Iterable[str]) -> str:
    """Return the command that builds a bundle again.

    Args:
        data: the bundle's manifest as JSON, of any schema version.
        folder: folder where the bundle lies.
        backends: backends to build for.
    """
    source, profile = data["source"], Profile.from_json(data["profile"])
    sizes = [("--shape", f"{h}x{w}") for h, w in profile.shapes] or [
        ("--height", str(profile.height)),
        ("--width", str(profile.width)),
    ]
    options = [
        ("--cond", data["condition"]["name"]),
        ("--model", source["model"]),
        *((f"--{part.replace('_', '-')}", source[part]) for part in _PARTS if source.get(part)),
        *(("--backend", backend) for backend in backends),
        ("--dtype", data["dtype"]),
        *sizes,
        ("--batch-size", str(profile.batch)),
        *([("--text-length", str(profile.text))] if profile.text else []),
        ("--output", str(folder)),
    ]
    return shlex.join(["icexport", "build", *(word for option in options for word in option)])


_PARTS = ("controlnet", "probe", "vae", "variant", "model_config")


def _condition(data: Mapping[str, Any]) -> ConditionInfo:
    low, high = data["value_range"]
    return ConditionInfo(**{**data, "value_range": (low, high)})


def _graph(data: Mapping[str, Any]) -> GraphEntry:
    sides = {
        side: tuple(TensorInfo(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in data[side])
        for side in ("inputs", "outputs")
    }
    return GraphEntry(**{**data, **sides, "plugins": tuple(data["plugins"])})


def _stamps(data: Mapping[str, Any]) -> Stamps:
    source, files = ({name: Stamp(**stamp) for name, stamp in data[part].items()} for part in ("source", "files"))
    return Stamps(source, files)


def check_paths(paths: Iterable[str], origin: Path) -> None:
    """Refuse paths that could reach outside the bundle.

    Raises:
        SchemaError: a path could; the offending paths are named.
    """
    bad = sorted(
        p
        for p in paths
        if not p or PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts or set(p) & set("\\:\0")
    )
    if bad:
        raise SchemaError(
            f"{origin} names paths outside the bundle: {', '.join(map(repr, bad))}. Do not use this bundle."
        )
