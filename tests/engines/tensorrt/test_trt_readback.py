"""Precision and plugins of networks and engines: what is read back, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import helper

from engines.errors import EngineError
from engines.tensorrt import readback
from engines.tensorrt.onnx_file import OnnxFile
from tests.engines.tensorrt.onnx_models import FLOAT, HALF, cast, conv, save
from tests.engines.tensorrt.small_builds import build, island, refuse

pytestmark = pytest.mark.tensorrt


@pytest.mark.parametrize(("element", "dtype"), [(FLOAT, "fp16"), (FLOAT, "bf16"), (HALF, "fp32")])
def test_another_precision_than_the_file_s(tmp_path: Path, element: int, dtype: str) -> None:
    node, weight = conv("only", "x", "y", element)
    path = save(tmp_path / "conv.onnx", [node], dict.fromkeys("xy", element), [weight])
    refuse(path, f"{dtype} was asked for, but nothing in conv.onnx has it: ", dtype)


def test_an_island_between_casts_is_what_the_file_wants(tmp_path: Path) -> None:
    report = build(island(tmp_path / "island.onnx"))
    assert report.precision["fp16"] >= 2
    assert report.precision["fp32"] >= 2


def test_a_part_that_was_forgotten(tmp_path: Path) -> None:
    said = refuse(island(tmp_path / "forgotten.onnx", casts=False), "compute in another type without a Cast")
    assert "node 'node_inner' (Conv, from module net.inner): fp32" in said


def test_half_precision_that_is_but_a_cast(tmp_path: Path) -> None:
    node, weight = conv("only", "wide", "wider", FLOAT)
    nodes = [cast("x", "wide", FLOAT), node, cast("wider", "y", HALF)]
    path = save(tmp_path / "cast.onnx", nodes, {"x": HALF, "wide": FLOAT, "wider": FLOAT, "y": HALF}, [weight])
    refuse(path, "none of the 1 convolutions and matrix products of cast.onnx computes in it")


def test_fp32_means_all_of_it(tmp_path: Path) -> None:
    outer, outer_weight = conv("outer", "x", "y", FLOAT)
    inner, inner_weight = conv("inner", "narrow", "narrower", HALF)
    values = {"x": FLOAT, "y": FLOAT, "narrow": HALF, "narrower": HALF, "z": FLOAT}
    nodes = [outer, cast("y", "narrow", HALF), inner, cast("narrower", "z", FLOAT)]
    path = save(tmp_path / "half.onnx", nodes, values, [outer_weight, inner_weight])
    refuse(path, "from module net.inner\\): fp16", "fp32")


def network(types: dict[str, str], layer_type: str = "CONVOLUTION", metadata: str = "") -> Any:
    """A network whose only layer has outputs of these types."""
    tensors = [SimpleNamespace(name=name, dtype=SimpleNamespace(name=kind)) for name, kind in types.items()]
    layer = SimpleNamespace(
        name="", metadata=metadata, type=layer_type, num_outputs=len(tensors), get_output=tensors.__getitem__
    )
    return SimpleNamespace(num_layers=1, get_layer=lambda _: layer, num_inputs=0)


def test_types_that_the_library_changed(tmp_path: Path) -> None:
    source = OnnxFile(island(tmp_path / "island.onnx"))
    assert readback.network_precision(network({"y": "HALF", "inner": "INT64"}), source, "fp16") == {
        "fp16": 1,
        "int64": 1,
    }
    with pytest.raises(EngineError, match="changed the types of island.onnx: y is fp32, in the file fp16"):
        readback.network_precision(network({"y": "FLOAT"}), source, "fp16")


def plugin_file(folder: Path) -> OnnxFile:
    nodes = [
        helper.make_node("dual_projection", ["x"], ["a"], name="node_a", domain="icexport"),
        helper.make_node("dual_projection", ["a"], ["y"], name="node_b", plugin_namespace="icexport", domain="other"),
    ]
    return OnnxFile(save(folder / "plugins.onnx", nodes, dict.fromkeys("xay", HALF)))


def test_plugins_are_found_in_the_network_or_missed(tmp_path: Path) -> None:
    source = plugin_file(tmp_path)
    module = SimpleNamespace(LayerType=SimpleNamespace(PLUGIN_V3="PLUGIN_V3"))
    plugin = "icexport::dual_projection"

    assert source.plugin_nodes(plugin) == {"node_a", "node_b"}
    both = network({}, "PLUGIN_V3", "[ONNX Layer: node_a]")
    layers = [both.get_layer(0), SimpleNamespace(**{**vars(both.get_layer(0)), "metadata": "[ONNX Layer: node_b]"})]
    both.num_layers, both.get_layer = 2, layers.__getitem__
    assert readback.network_plugins(module, both, source, (plugin,)) == (plugin,)
    with pytest.raises(
        EngineError, match="icexport::dual_projection was asked for, but nodes node_b became no plugin"
    ):
        readback.network_plugins(module, network({}, "PLUGIN_V3", "[ONNX Layer: node_a]"), source, (plugin,))
    with pytest.raises(EngineError, match="nodes node_a; node_b became no plugin"):
        readback.network_plugins(module, network({}, "CONVOLUTION", "[ONNX Layer: node_a]"), source, (plugin,))
    with pytest.raises(EngineError, match="icexport::other was asked for, but no node calls it"):
        readback.network_plugins(module, both, source, ("icexport::other",))


def engine(layers: list[Any], types: dict[str, str]) -> Any:
    """A loaded engine whose inspector tells of these layers."""
    text = json.dumps({"Layers": layers, "Bindings": list(types)})
    return SimpleNamespace(
        num_io_tensors=len(types),
        get_tensor_name=list(types).__getitem__,
        get_tensor_dtype=lambda name: SimpleNamespace(name=types[name]),
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: text),
    )


def layer(**output: str) -> dict[str, Any]:
    return {"Name": "conv", "LayerType": "CaskConvolution", "Outputs": [{"Name": "y", "Dimensions": [1], **output}]}


MODULE = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="JSON"))
IO = {"x": "HALF", "narrow": "HALF"}


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ({"Format/Datatype": "Half"}, "fp16"),
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "fp16"),
        ({"Datatype": "Half", "Format": "Row major linear format (kLINEAR)"}, "fp16"),
        ({"Format/Datatype": "Row major linear FP32"}, "fp32"),
        ({"DataType": "BFloat16", "Format": "kLINEAR"}, "bf16"),
        ({"Format/Datatype": "Int64"}, "int64"),
        ({"Format/Datatype": "Bool"}, "bool"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, "other"),
    ],
)
def test_types_as_the_inspectors_of_tensorrt_10_and_11_write_them(
    tmp_path: Path, output: dict[str, str], kind: str
) -> None:
    source = OnnxFile(island(tmp_path / "island.onnx"))
    half = layer(**{"Format/Datatype": "Half"})
    found = readback.engine_precision(MODULE, engine([layer(**output), half], IO), source, "fp16", 0)
    assert found == dict(Counter([kind, "fp16"]))


@pytest.mark.parametrize(
    ("layers", "io", "plugins", "problem"),
    [
        ([layer(DataType="Float")], IO, 0, "fp16 was asked for, but no layer of the engine has it: 1 fp32"),
        ([layer(DataType="Half")], {"x": "FLOAT"}, 0, "x of the engine is fp32, in island.onnx fp16"),
        (["conv + relu"], IO, 0, "describes no layer"),
        ([layer(DataType="Half"), {"LayerType": "PluginV3"}], IO, 2, "2 plugin layers .* the engine holds 1"),
    ],
)
def test_engines_that_are_not_what_was_asked_for(
    tmp_path: Path, layers: list[Any], io: dict[str, str], plugins: int, problem: str
) -> None:
    source = OnnxFile(island(tmp_path / "island.onnx"))
    with pytest.raises(EngineError, match=problem):
        readback.engine_precision(MODULE, engine(layers, io), source, "fp16", plugins)
