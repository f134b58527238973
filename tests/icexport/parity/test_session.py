from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from icexport.export.widen import widen
from icexport.parity.session import open_session, run_session


def test_a_weight_is_cast_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes a norm apart and runs what comes of it after all nodes that wait for nothing: the casts."""
    norm = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y0"], "norm", num_groups=1)
    products = [helper.make_node("MatMul", [f"y{i}", f"w{i}"], [f"y{i + 1}"], f"product{i}") for i in range(4)]
    half = TensorProto.FLOAT16
    names = [output for node in (norm, *products) for output in node.output]
    described = {name: helper.make_tensor_value_info(name, half, [1, 2, 4]) for name in ("x", *names)}
    weights = {"scale": np.ones(2), "bias": np.zeros(2)} | {f"w{i}": np.eye(4) for i in range(4)}
    graph = helper.make_graph(
        [norm, *products],
        "g",
        [described["x"]],
        [described["y4"]],
        [numpy_helper.from_array(value.astype(np.float16), name) for name, value in weights.items()],
        value_info=[described[name] for name in names[:-1]],
    )
    model = widen(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), range(5))
    made = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        options = made()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", profiled)
    session = open_session(model, ["y4"], tmp_path, frugal=True)

    (found,) = run_session(session, {"x": torch.arange(8.0).reshape(1, 2, 4)})

    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    order = [name for name in ran if name.startswith(("cast_w", "product"))]
    assert order == [name for i in range(4) for name in (f"cast_w{i}_to_w{i}.fp32", f"product{i}")]
    expected = torch.nn.functional.group_norm(torch.arange(8.0).reshape(1, 2, 4), 1)
    np.testing.assert_allclose(found, expected, atol=2e-3)
