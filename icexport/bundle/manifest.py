"""The manifest ``icexport.json``: what a bundle holds, what it was made from, and how well it matched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from icexport.errors import BundleError, DamagedBundleError, SchemaError, UsageError
from icexport.graphs.profile import Profile

MANIFEST_NAME = "icexport.json"
PROBE_FOLDER = "probe"
"""Where a bundle keeps the weights of its probe, for kernels that no engine holds."""
SCHEMA_VERSION = 2
"""1: the first. 2: engines say what they were built for, graphs have float32 islands and a twin with plugins, and
profiles may list sizes. Bundles of version 1 are read as they are."""


@dataclass(frozen=True)
class GraphEntry:
    """One ONNX graph of the bundle.

    Attributes:
        file: path in the bundle; the weights are in ``<file>.data`` where there are any.
        inputs: name, dtype and shape of each input, shapes with symbols as in ``TensorSpec``.
        outputs: likewise.
        dtypes: number of weights of each element type, read back from the written file.
        islands: what was moved to float32 in a graph of lower precision, with the evidence.
        plugin_file: path of the same graph with plugins as custom nodes; None where there is none.
    """

    file: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    dtypes: dict[str, int]
    islands: list[dict[str, Any]] = field(default_factory=list)
    plugin_file: str | None = None


@dataclass(frozen=True)
class EngineEntry:
    """One engine: a graph made ready for a backend.

    Attributes:
        graph: name of the graph.
        backend: as in ``engines.BACKENDS``.
        version: of the backend when it was built.
        files: paths in the bundle that only this engine needs; empty where the backend runs the ONNX file itself.
        device: what it was built for, e.g. ``sm_86+sm_89``; ``any`` if it does not matter.
        report: what the builder told: seconds, memory, precision and plugins read back; empty if nothing was built.
    """

    graph: str
    backend: str
    version: str
    files: list[str] = field(default_factory=list)
    device: str = "any"
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Manifest:
    """Everything that a bundle says of itself. Contract: design of the bundle on disk, schema version 1.

    Attributes:
        key: hash of everything that the bundle was made from; equal keys mean equal bundles.
        condition: name, value range, polarity, metric, unit and direction of the control map.
        source: model, ControlNet and probe as given, with the SHA-256 of each of their files.
        dtype: ``fp32`` or ``fp16``.
        opset: ONNX opset of the graphs.
        profile: allowed pictures per call and sizes in pixels.
        graphs: by name.
        configs: diffusers' and the probe's configs, by component.
        engines: by engine key.
        files: SHA-256 of every file of the bundle but the manifest, by POSIX path.
        tolerances: of the parity gate.
        parity: results of the parity gate by backend and graph; empty where it was skipped.
        fidelity: results of the fidelity gate; None where it has not run.
        versions: of icexport and of the libraries that made the bundle.
    """

    key: str
    condition: dict[str, Any]
    source: dict[str, Any]
    dtype: str
    opset: int
    profile: Profile
    graphs: dict[str, GraphEntry]
    configs: dict[str, dict[str, Any]]
    engines: dict[str, EngineEntry]
    files: dict[str, str]
    tolerances: dict[str, float]
    parity: dict[str, Any]
    versions: dict[str, str]
    fidelity: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write ``icexport.json`` into ``folder``."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a bundle; no other file is touched.

        Raises:
            BundleError: there is no bundle in ``folder``.
            SchemaError: a newer schema version, a missing field, or a path that leaves the folder.
            DamagedBundleError: the manifest is not JSON.
        """
        path = folder / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST_NAME}. Make one with: icexport build --cond canny "
                f"--output {folder}"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DamagedBundleError(f"{path} is damaged: {error}. Build the bundle again.") from error
        return cls._from_json(data, path)

    @classmethod
    def _from_json(cls, data: Any, path: Path) -> Manifest:
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int:
            raise SchemaError(f"{path} has no schema_version: it is not a manifest of icexport.")
        if version > SCHEMA_VERSION:
            raise SchemaError(
                f"{path} has schema version {version}; this icexport reads up to {SCHEMA_VERSION}. Upgrade icexport."
            )
        known = {f.name for f in fields(cls)}
        missing = sorted(known - data.keys())
        if missing:
            raise SchemaError(f"{path} lacks: {', '.join(missing)}. Build the bundle again.")
        try:
            values = {name: data[name] for name in known}
            values["profile"] = Profile.from_json(values["profile"])
            values["graphs"] = {n: GraphEntry(**g) for n, g in values["graphs"].items()}
            values["engines"] = {n: EngineEntry(**e) for n, e in values["engines"].items()}
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


def check_paths(paths: Iterable[str], origin: Path) -> None:
    """Refuse paths that could reach outside the bundle.

    Raises:
        SchemaError: naming the offending paths.
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


def key_parts(
    *,
    graph_hash: str,
    weights_hash: str,
    profile: Profile,
    dtype: str,
    backend: str,
    version: str,
    device: str,
    kernels: str = "",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that could change what an engine computes; its digest is the engine's key, its content address.

    Args:
        graph_hash: SHA-256 of the ``.onnx`` file.
        weights_hash: SHA-256 of its ``.data`` file; two ControlNets of one architecture differ only here.
        profile: sizes that the engine is built for.
        dtype: of the graph.
        backend: and ``version``: what builds and runs it.
        version: see ``backend``.
        device: ``any``, or the compute capabilities or the GPU that the engine is built for.
        kernels: hash of the custom kernels inside, empty for none.
        options: of the builder.
    """
    return {
        "graph": graph_hash,
        "weights": weights_hash,
        "profile": profile.to_json(),
        "dtype": dtype,
        "backend": backend,
        "version": version,
        "device": device,
        "kernels": kernels,
        "options": dict(options or {}),
    }
