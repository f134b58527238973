from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from icexport.errors import ExportError, UsageError
from icexport.export.precision import FP32_ISLANDS, read_precision
from icexport.models.precision import PRECISIONS, precision


def save(path: Path, weights: dict[str, tuple[int, list[int]]], nodes: list[onnx.NodeProto]) -> Path:
    tensors = []
    for name, (kind, dims) in weights.items():
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensors.append(tensor)
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    onnx.save(helper.make_model(graph), path)
    return path


def norm(kind: str = "GroupNormalization", **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, ["x", "s", "b"], ["y"], name="norm1", **attributes)


def test_names() -> None:
    assert precision("fp16").torch is torch.float16
    assert precision("bf16").torch is torch.bfloat16
    assert tuple(PRECISIONS) == ("fp32", "fp16", "bf16")
    with pytest.raises(UsageError, match="--dtype int8: choose fp32 or fp16"):
        precision("int8")


def test_weights_are_counted(tmp_path: Path) -> None:
    weights = {
        "w": (TensorProto.FLOAT16, [8, 4, 3, 3]),
        "table": (TensorProto.FLOAT, [160]),
        "n": (TensorProto.INT64, []),
    }
    path = save(tmp_path / "g.onnx", weights, [norm()])

    assert read_precision(path, PRECISIONS["fp16"]) == {"float": 160, "float16": 288, "int64": 1}
    assert FP32_ISLANDS


def test_a_float32_weight_in_fp16_is_named(tmp_path: Path) -> None:
    weights = {"w": (TensorProto.FLOAT16, [8]), "forgotten": (TensorProto.FLOAT, [64, 65])}
    path = save(tmp_path / "g.onnx", weights, [])

    with pytest.raises(ExportError, match=r"g\.onnx is not the fp16 graph .*forgotten \(float, 4160 elements\)"):
        read_precision(path, PRECISIONS["fp16"])
    assert read_precision(path, PRECISIONS["fp32"]) == {"float": 4160, "float16": 8}


def test_float16_weights_in_fp32_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", {"small": (TensorProto.FLOAT16, [64, 65])}, [])

    with pytest.raises(ExportError, match=r"not the fp32 graph .*small"):
        read_precision(path, PRECISIONS["fp32"])


def test_float16_statistics_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", {}, [norm(stash_type=TensorProto.FLOAT16)])

    with pytest.raises(ExportError, match="norm1: GroupNormalization keeps statistics in type 10"):
        read_precision(path, PRECISIONS["fp16"])
    read_precision(save(path, {}, [norm("LayerNormalization", stash_type=TensorProto.FLOAT)]), PRECISIONS["fp16"])


def test_bfloat16(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", {"w": (TensorProto.BFLOAT16, [64, 65])}, [norm()])

    assert read_precision(path, PRECISIONS["bf16"]) == {"bfloat16": 4160}
    with pytest.raises(ExportError, match=r"not the fp16 graph .*w \(bfloat16, 4160 elements\)"):
        read_precision(path, PRECISIONS["fp16"])


def test_weights_of_islands_are_in_float32(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", {"conv1.weight.fp32": (TensorProto.FLOAT, [64, 65])}, [])

    assert read_precision(path, PRECISIONS["fp16"]) == {"float": 4160}
    with pytest.raises(ExportError, match="not the bf16 graph"):
        read_precision(path, PRECISIONS["bf16"])
