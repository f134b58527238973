"""``icexport inspect``: what a bundle, a model folder or a single file is, without loading weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icexport.cli.console import emit, show
from icexport.cli.options import Json
from icexport.cli.summary import engine_rows, graph_rows, parity_rows
from icexport.errors import CheckpointError, UsageError
from icexport.models import kinds
from icexport.models.weights import PICKLES, find_weights, library_of, tensor_shapes

if TYPE_CHECKING:
    from icexport.bundle.store import Bundle


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            exists=True,
            show_default=False,
            help="Folder of a bundle, model or probe; a file of weights, .onnx or .plan.",
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
    elif path.suffix in PICKLES:
        document = _pickle(path)
    else:
        raise UsageError(f"{path} is no bundle, no model folder, and no file of weights, no .onnx and no .plan file.")
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
    kind = "model" if parts else "probe" if config.get("_class_name") == "InnerControlProbe" else "component"
    document = {"kind": kind, "path": str(path), "class": config.get("_class_name", "unknown")}
    return {**document, **({} if parts else {"config": config}), "components": components}


def _component(folder: Path, root: Path) -> dict[str, Any]:
    """Describe a component by the weights that would be read."""
    config = _json(folder / "config.json")
    name = folder.relative_to(root).as_posix()
    kind = kinds.kind_of_config(config)
    try:
        weights = find_weights(folder, library_of(kind.part if kind else name))
    except (CheckpointError, UsageError) as error:
        return {"component": name, "class": kinds.class_of(config) or "unknown", "problem": str(error)}
    files = [Path(file) for file in weights.files if file != weights.index]
    shapes = [shape for file in files for shape in tensor_shapes(file).values()]
    dtypes = {dtype for file in files if file.suffix == ".safetensors" for dtype, _ in _header(file).values()}
    return {
        "component": name,
        "class": kinds.class_of(config) or "unknown",
        "parameters": sum(prod(shape) for shape in shapes),
        "dtypes": sorted(dtypes),
        "MB": sum(file.stat().st_size for file in files) / 1e6,
        "files": [file.name for file in files],
        **({"variant": weights.variant} if weights.variant else {}),
    }


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    tensors = _header(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    dtypes = sorted({dtype for dtype, _ in tensors.values()})
    return _tensors(path, "safetensors", {n: shape for n, (_, shape) in tensors.items()}, dtypes, metadata)


def _pickle(path: Path) -> dict[str, Any]:
    """Describe a checkpoint of PyTorch; only tensors and plain containers are read from it."""
    return _tensors(path, "pickle", tensor_shapes(path), [], {})


def _tensors(
    path: Path, kind: str, shapes: kinds.Shapes, dtypes: list[str], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Describe a file of weights."""
    groups: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        group = name.split(".", 1)[0]
        groups[group] += prod(shape)
        counts[group] += 1
    return {
        "kind": kind,
        "is": kinds.explain(kinds.kind_of_tensors(shapes)),
        "path": str(path),
        "MB": path.stat().st_size / 1e6,
        "tensors": len(shapes),
        "parameters": sum(groups.values()),
        "dtypes": dtypes,
        "metadata": dict(metadata),
        "groups": [{"name": name, "tensors": counts[name], "parameters": groups[name]} for name in groups],
    }


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape of every tensor of a safetensors file; no weights are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
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
