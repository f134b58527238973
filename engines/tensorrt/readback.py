"""What a network or an engine really holds: its precision and its plugins, compared with what was asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from engines.errors import EngineError
from engines.tensorrt.onnx_file import FLOATS, OnnxFile

_DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
_INSPECTOR = (  # of the words in an inspector's text, the first that is found decides: "bfloat16" holds "float"
    ("bf16", ("bf16", "bfloat16")),
    ("fp16", ("fp16", "half", "float16")),
    ("fp8", ("fp8",)),
    ("fp32", ("fp32", "float")),
    *((name, (name,)) for name in ("int64", "int32", "uint8", "int8", "int4", "bool")),
)
_LISTED = 5


def network_precision(network: Any, source: OnnxFile, dtype: str) -> dict[str, int]:
    """Count the types of the layers' outputs in a parsed network, after comparing them with the file and the request.

    Args:
        network: ``INetworkDefinition``.
        source: what it was parsed from.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.

    Returns:
        Type (``"fp16"``, ``"int64"`` ...) -> number of layer outputs.

    Raises:
        EngineError: if a value has another type than the file says; if not one layer has the type asked for; if a
            convolution or matrix product computes in another type and no Cast in the file accounts for it.
    """
    outputs = [(tensor.name, _kind(tensor.dtype)) for tensor in _outputs(network)]
    inputs = (network.get_input(index) for index in range(network.num_inputs))
    found = dict(outputs) | {tensor.name: _kind(tensor.dtype) for tensor in inputs}
    changed = [
        f"{name} is {found[name]}, in the file {kind}"
        for name, kind in source.types.items()
        if kind in FLOATS and found.get(name, kind) != kind
    ]
    if changed:
        raise EngineError(f"TensorRT changed the types of {source.path.name}: {_some(changed)}. No plan was written.")
    counts = Counter(kind for _, kind in outputs)
    _require(source, dtype, counts, found)
    return dict(counts)


def network_plugins(module: Any, network: Any, source: OnnxFile, plugins: Sequence[str]) -> tuple[str, ...]:
    """Find the plugins asked for in a parsed network.

    Args:
        module: the TensorRT library.
        network: ``INetworkDefinition``.
        source: what it was parsed from.
        plugins: names of the plugins, ``namespace::name`` each.

    Returns:
        ``plugins``, all found.

    Raises:
        EngineError: if a plugin is not in the file, or a node of it is not a plugin layer in the network.
    """
    layers = [layer for layer in _layers(network) if layer.type == module.LayerType.PLUGIN_V3] if plugins else []
    origins = {layer.metadata for layer in layers} | {layer.name for layer in layers}
    for plugin in plugins:
        nodes = source.plugin_nodes(plugin)
        missing = sorted(node for node in nodes if not origins & {node, f"[ONNX Layer: {node}]"})
        if not nodes or missing:
            what = f"nodes {_some(missing)} became no plugin" if missing else "no node calls it"
            raise EngineError(
                f"plugin {plugin} was asked for, but {what} in the network of {source.path.name}. Export the graph "
                "with plugins, or build it without."
            )
    return tuple(plugins)


def engine_precision(module: Any, engine: Any, source: OnnxFile, dtype: str, plugin_nodes: int) -> dict[str, int]:
    """Count the types of the layers' outputs in an engine, after comparing it with the file and the request.

    Args:
        module: the TensorRT library.
        engine: ``ICudaEngine``, built with detailed profiling verbosity.
        source: what it was built from.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        plugin_nodes: number of plugin layers that it must hold at least.

    Returns:
        As `network_precision`; ``"other"`` counts outputs whose type the inspector does not tell, as for free shapes.

    Raises:
        EngineError: if an input or output has another type than in the file, no layer has the type asked for, or
            plugins are missing.
    """
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = _kind(engine.get_tensor_dtype(name))
        if source.types.get(name) != kind:
            raise EngineError(f"{name} of the engine is {kind}, in {source.path.name} {source.types.get(name)}.")
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    if not layers:
        raise EngineError("the engine inspector of TensorRT describes no layer: the precision cannot be read back.")
    counts = Counter(_inspected(tensor) for layer in layers for tensor in layer.get("Outputs", []))
    if not counts[dtype] and not counts["other"]:
        raise EngineError(f"{dtype} was asked for, but no layer of the engine has it: {_counted(counts)}.")
    plugins = sum("plugin" in str(layer.get("LayerType", "")).lower() for layer in layers)
    if plugins < plugin_nodes:
        raise EngineError(f"{plugin_nodes} plugin layers were asked for, the engine holds {plugins}.")
    return dict(counts)


def _require(source: OnnxFile, dtype: str, counts: Counter[str], found: dict[str, str]) -> None:
    advice = f"Export the graph in {dtype}; TensorRT takes the types from the file."
    if not counts[dtype]:
        raise EngineError(
            f"{dtype} was asked for, but nothing in {source.path.name} has it: {_counted(counts)}. {advice}"
        )
    right, total = source.weighted(dtype, found)
    if total and not right:
        raise EngineError(
            f"{dtype} was asked for, but none of the {total} convolutions and matrix products of {source.path.name} "
            f"computes in it. {advice}"
        )
    strays = source.strays(dtype, found)
    if strays:
        raise EngineError(
            f"{dtype} was asked for, but parts of {source.path.name} compute in another type without a Cast that says "
            f"so: {_some(strays)}. {advice}"
        )


def _kind(dtype: Any) -> str:
    """Return our name of a ``DataType``."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _outputs(network: Any) -> Iterator[Any]:
    return (layer.get_output(index) for layer in _layers(network) for index in range(layer.num_outputs))


def _inspected(tensor: dict[str, object]) -> str:
    """Find a tensor's type in the inspector's JSON: TensorRT 11 has a field for it, 10 only a text that holds it."""
    text = " ".join(
        str(value) for key, value in tensor.items() if "type" in key.lower() or "format" in key.lower()
    ).lower()
    return next((kind for kind, words in _INSPECTOR if any(word in text for word in words)), "other")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"{'; '.join(listed[:_LISTED])}{more}"
