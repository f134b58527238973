"""What tests share is what each of them would have exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines.base import TensorSpec
from icexport.graphs.graph import Graph
from icexport.graphs.profile import SizeRange
from tests.exports import sharing

SYMBOLS = {"samples": SizeRange.parse("1:1:4")}


class Net(nn.Module):
    def __init__(self, weight: float = 1.0, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.inner = nn.Linear(1, 1)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        nn.init.constant_(self.inner.weight, weight)
        nn.init.zeros_(self.inner.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x - 1


def graph(module: nn.Module | None = None, name: str = "net") -> Graph:
    spec = TensorSpec("x", torch.float32, ("samples", 4))
    return Graph(name, module or Net(), (spec,), (spec,))


def changed_buffer() -> Net:
    net = Net()
    net.table[1] = 5
    return net


@pytest.fixture
def traced() -> list[str]:
    return []


@pytest.fixture
def export(tmp_path: Path, traced: list[str]) -> Any:
    def traces(graph: Graph, path: Path, _symbols: Mapping[str, Any], opset: int) -> None:
        traced.append(graph.name)
        path.write_text(f"{len(traced)}, opset {opset}")
        path.with_name(f"{path.name}.data").write_text("weights")

    (tmp_path / "exports").mkdir()
    return sharing(traces, tmp_path / "exports")


def test_an_equal_graph_is_traced_once(export: Any, traced: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found = graph(Net().train())
        export(found, tmp_path / name / "net.onnx", SYMBOLS, 21)
        assert not found.module.training
        assert (tmp_path / name / "net.onnx").read_text() == "1, opset 21"
        assert (tmp_path / name / "net.onnx.data").read_text() == "weights"
    assert traced == ["net"]


@pytest.mark.parametrize(
    "other",
    [
        {"graph": graph(Net(weight=2))},
        {"graph": graph(Net(heads=4))},
        {"graph": graph(Net().half())},
        {"graph": graph(Other())},
        {"graph": graph(changed_buffer())},
        {"graph": graph(name="unet")},
        {"opset": 22},
        {"symbols": {"samples": SizeRange.parse(1)}},
    ],
)
def test_whatever_changes_a_trace_makes_another(
    export: Any, traced: list[str], tmp_path: Path, other: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {"graph": graph(), "path": tmp_path / "net.onnx", "symbols": SYMBOLS, "opset": 21}
    for given in (usual, usual | other):
        export(*given.values())
    assert len(traced) == 2


def test_a_failed_trace_is_not_shared(tmp_path: Path) -> None:
    def fails(_graph: Graph, path: Path, *_rest: Any) -> None:
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / "exports").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            sharing(fails, tmp_path / "exports")(graph(), tmp_path / "net.onnx", SYMBOLS, 21)
    assert not (tmp_path / "net.onnx").exists()
