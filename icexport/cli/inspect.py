"""``icexport inspect``: what a bundle, a model folder or a single file is, without loading weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icexport.cli.console import emit, show
from icexport.cli.options import Json
from icexport.cli.summary import engine_rows, graph_rows, parity_rows
from icexport.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from icexport.bundle.store import Bundle

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            exists=True, show_default=False, help="Folder of a bundle, model or probe; .safetensors, .onnx or .plan."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Tell what a bundle, model or file is.

    Graphs, hashes, precision, what built it. A bundle that is damaged is an error, which names the files.
    """
    document, brief = describe(path)
    if as_json:
        emit(document)
    else:
        show(brief)


def describe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return everything known of ``path``, and the part of it that a person wants to see.

    Raises:
        UsageError: ``path`` is nothing that icexport knows.
        CheckpointError: a model file is damaged.
        BundleError: a bundle is damaged or of a newer schema.
    """
    if path.is_dir():
        if (path / "icexport.json").is_file():
            return _bundle(path)
        document = _folder(path)
    elif path.suffix == ".safetensors":
        document = _safetensors(path)
    elif path.suffix == ".onnx":
        document = _onnx(path)
    elif path.suffix == ".plan":
        document = _plan(path)
    elif path.suffix in _PICKLES:
        raise UsageError(f"{path} is a pickle, which can hold code: it is not opened here. Use: icexport convert")
    else:
        raise UsageError(f"{path} is no bundle, no model folder, and no .safetensors, .onnx or .plan file.")
    return document, document


def _bundle(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from icexport.bundle.store import Bundle

    bundle = Bundle(path)
    bundle.verify()
    manifest = bundle.manifest
    rows = graph_rows(bundle)
    engines = engine_rows(bundle)
    shown = ("backend", "graph", "device", "precision", "read_from", "plugins", "MB", "seconds")
    plans = [{**{n: row[n] for n in shown}, "key": row["key"][:12]} for row in engines if row["MB"]]
    backends = {row["backend"]: row["version"] for row in engines}
    reasons: dict[str, set[str]] = {name: set() for name in backends}
    for row in engines:
        reasons[row["backend"]].add(_runs_here(bundle, row["key"]))
    brief = {
        "kind": "bundle",
        "path": str(path),
        "intact": True,
        "key": manifest.key,
        "condition": manifest.condition.name,
        "metric": f"{manifest.condition.metric} [{manifest.condition.unit}]",
        "source": {
            part: getattr(manifest.source, part) or "beside the model" for part in ("model", "controlnet", "probe")
        },
        "dtype": manifest.dtype,
        "opset": manifest.opset,
        "sizes": {axis: str(getattr(manifest.profile, axis)) for axis in ("batch", "height", "width")},
        **({"shapes": [f"{h}x{w}" for h, w in manifest.profile.shapes]} if manifest.profile.shapes else {}),
        "built_with": manifest.versions,
        "graphs": [{**row, "inputs": len(row["inputs"]), "outputs": len(row["outputs"])} for row in rows],
        "backends": backends,
        "runs_here": {name: "; ".join(sorted(found)) for name, found in reasons.items()},
        "islands": [{"graph": name, **island} for name, g in manifest.graphs.items() for island in g.islands],
        "engines": plans or "the graphs themselves",
        "parity": parity_rows(manifest.parity) or "not checked",
    }
    return {"kind": "bundle", "path": str(path), "intact": True, **asdict(manifest)}, brief


def _runs_here(bundle: Bundle, key: str) -> str:
    """Return ``yes``, or why the engine cannot run on this machine."""
    from icexport.backends import table
    from icexport.backends.engines import default_device

    entry = bundle.manifest.engines[key]
    backend = table.get(entry.backend)
    if not (state := backend.check()).usable:
        return f"no: {state.reason}"
    reason = backend.refusal(bundle, key, entry, default_device(bundle, entry.backend))
    return f"no: {reason}" if reason else "yes"


def _plan(path: Path) -> dict[str, Any]:
    """Describe a TensorRT plan by what was written down beside it: it can be read on its own kind of GPU only."""
    from icexport.backends.plans import REPORT_NAME

    report = _json(path.parent / REPORT_NAME)
    if not report:
        raise UsageError(f"{path} has no {REPORT_NAME} beside it, so it is no plan of icexport.")
    return {"kind": "plan", "path": str(path), "MB": path.stat().st_size / 1e6, **report}


def _folder(path: Path) -> dict[str, Any]:
    """Return a model of several components, or one component."""
    parts = sorted(p for p in path.iterdir() if (p / "config.json").is_file())
    config = _json(path / "model_index.json") or _json(path / "config.json")
    if not parts and not config:
        raise UsageError(f"{path} is no bundle (icexport.json) and no model folder (model_index.json or config.json).")
    components = [_component(part, path) for part in (parts or [path])]
    if pickles := sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix in _PICKLES):
        components.append({"component": "pickles, which are not read", "class": ", ".join(pickles)})
    kind = "model" if parts else "probe" if config.get("_class_name") == "InnerControlProbe" else "component"
    document = {"kind": kind, "path": str(path), "class": config.get("_class_name", "unknown")}
    return {**document, **({} if parts else {"config": config}), "components": components}


def _component(folder: Path, root: Path) -> dict[str, Any]:
    config = _json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in _header(file).values()]
    return {
        "component": folder.relative_to(root).as_posix(),
        "class": config.get("_class_name") or ", ".join(config.get("architectures") or ["unknown"]),
        "parameters": sum(prod(shape) for _, shape in tensors),
        "dtypes": sorted({dtype for dtype, _ in tensors}),
        "MB": sum(file.stat().st_size for file in files) / 1e6,
        "files": [file.name for file in files],
    }


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    tensors = _header(path)
    groups: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, (_, shape) in tensors.items():
        group = name.split(".", 1)[0]
        groups[group] += prod(shape)
        counts[group] += 1
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return {
        "kind": "safetensors",
        "path": str(path),
        "MB": path.stat().st_size / 1e6,
        "tensors": len(tensors),
        "parameters": sum(groups.values()),
        "dtypes": sorted({dtype for dtype, _ in tensors.values()}),
        "metadata": metadata,
        "groups": [{"name": name, "tensors": counts[name], "parameters": groups[name]} for name in groups],
    }


def _header(path: Path) -> dict[str, tuple[str, Sequence[int]]]:
    """Return the type and shape of every tensor of a safetensors file; no weights are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return {name: (found.get_dtype(), found.get_shape()) for name, found in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}. Copy or download it again.") from error


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return config


def _onnx(path: Path) -> dict[str, Any]:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no ONNX file: {error}.") from error
    if not model.graph.node:
        raise CheckpointError(f"{path} is damaged or no ONNX file: it has no nodes.")
    weights: Counter[str] = Counter()
    data: set[str] = set()
    for tensor in model.graph.initializer:
        weights[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += prod(tensor.dims)
        data |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    if missing := sorted(name for name in data if not (path.parent / name).is_file()):
        raise CheckpointError(f"{path} has its weights in {', '.join(missing)}, which is missing beside it.")
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "kind": "onnx",
        "path": str(path),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "data_files": sorted(data),
        "weights": dict(weights),
        "nodes": len(model.graph.node),
        "operators": dict(operators.most_common()),
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
    }


def _value(value: Any) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "shape": shape}
