from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from engines.base import TensorSpec
from engines.errors import ShapeError
from icexport.models.precision import PRECISIONS
from icexport.parity.simulation import SimulatedEngine

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def model_of(kind: int) -> onnx.ModelProto:
    """``y = (x + large) - large``, ``z = y * step`` with a float32 ``step``, all outputs."""
    shape = [2, 3]
    nodes = [
        helper.make_node("Add", ["x", "large"], ["sum"], name="n0"),
        helper.make_node("Sub", ["sum", "large"], ["y"], name="n1"),
        helper.make_node("Cast", ["step"], ["low"], name="n2", to=kind),
        helper.make_node("Mul", ["y", "low"], ["z"], name="n3"),
    ]
    large = helper.make_tensor("large", kind, [1], [3000.0])
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", kind, shape),
            helper.make_tensor_value_info("step", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info(name, kind, shape) for name in ("y", "z")],
        [large],
        value_info=[
            helper.make_tensor_value_info("sum", kind, shape),
            helper.make_tensor_value_info("low", kind, []),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def engine_of(dtype: str, model: onnx.ModelProto) -> SimulatedEngine:
    low = PRECISIONS[dtype].torch
    inputs = (TensorSpec("x", low, (2, 3)), TensorSpec("step", torch.float32, ()))
    outputs = (TensorSpec("y", low, (2, 3)), TensorSpec("z", low, (2, 3)))
    return SimulatedEngine("g", model, Path(), inputs, outputs, PRECISIONS[dtype])


@pytest.mark.parametrize("dtype", KINDS)
def test_rounds_as_pytorch_does(dtype: str) -> None:
    engine = engine_of(dtype, model_of(KINDS[dtype]))
    x, step = torch.randn((2, 3), generator=torch.Generator().manual_seed(0)) * 100, torch.tensor(1.2345)
    low = PRECISIONS[dtype].torch

    found = engine({"x": x, "step": step})

    y = (x.to(low) + 3000) - 3000
    assert list(found) == ["y", "z"]
    assert torch.equal(found["y"], y.float())
    assert torch.equal(found["z"], (y * step.to(low)).float())
    assert not torch.equal(found["y"], x)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert list(engine({"x": x, "step": step}, ["z"])) == ["z"]
    with pytest.raises(ShapeError, match="missing: step"):
        engine({"x": x})


def test_overflow_is_seen() -> None:
    """Up to 65504, and nothing beyond; ONNX Runtime itself rounds the inputs and the outputs only."""
    x = torch.full((2, 3), 64_000.0)

    found = engine_of("fp16", model_of(TensorProto.FLOAT16))({"x": x, "step": torch.tensor(1.0)})

    assert bool(found["y"].isinf().all())
    assert bool(
        engine_of("bf16", model_of(TensorProto.BFLOAT16))({"x": x, "step": torch.tensor(1.0)})["y"].isfinite().all()
    )


def test_float32_islands_are_not_rounded() -> None:
    model = model_of(TensorProto.FLOAT16)
    cast = helper.make_node("Cast", ["x"], ["x32"], name="c0", to=TensorProto.FLOAT)
    back = helper.make_node("Cast", ["y32"], ["y"], name="c1", to=TensorProto.FLOAT16)
    add, sub, *rest = model.graph.node
    add.input[:], add.output[:], sub.input[:], sub.output[:] = ["x32", "large"], ["sum32"], ["sum32", "large"], ["y32"]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32([3000]), "large"))
    nodes = [cast, add, sub, back, *rest]
    del model.graph.node[:], model.graph.value_info[0]
    model.graph.node.extend(nodes)
    x = torch.randn((2, 3), generator=torch.Generator().manual_seed(0))

    found = engine_of("fp16", model)({"x": x, "step": torch.tensor(1.0)})["y"]

    assert torch.equal(found, ((x.half().float() + 3000) - 3000).half().float())
