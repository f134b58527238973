"""Attention as one node: the same numbers, no score matrix, and nothing else touched."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.export import Dim

from engines.onnxruntime import OnnxRuntimeEngine
from engines.rewrites.attention import DOMAIN
from engines.rewrites.rewrite import rewrite
from tests.engines.rewrites.exporting import operators, save

WIDTH, HEADS, TOKENS = 32, 2, 24


class Model(nn.Module):
    """Self-attention and attention to a text, as diffusers computes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
        self.text = Attention(WIDTH, cross_attention_dim=20, heads=HEADS, dim_head=WIDTH // HEADS)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.own(x)
        found: Tensor = x + self.text(x, encoder_hidden_states=text)
        return found


class Masked(Model):
    """Its first attention has a mask."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        layers = (self.own.to_q, self.own.to_k, self.own.to_v)
        heads = [layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in layers]
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -1e4)
        x = x + nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        found: Tensor = x + self.text(x, encoder_hidden_states=text)
        return found


def inputs(rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (rows, TOKENS, WIDTH), "text": (rows, 7, 20)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def export(model: nn.Module, path: Path, opset: int = 21, dtype: torch.dtype = torch.float32) -> Path:
    rows = {0: Dim("samples", min=1, max=8)}
    module = copy.deepcopy(model).to(dtype)
    return save(module, inputs(dtype=dtype), ("y",), (rows, rows), path, opset)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``Model`` as it is exported; do not write beside it."""
    return export(Model(), tmp_path_factory.mktemp("plain") / "graphs" / "net.onnx")


def test_the_same_numbers_without_the_scores(path: Path, tmp_path: Path) -> None:
    model = Model()
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    fused = tmp_path / "fused" / "net.onnx"

    assert rewrite(path, fused)["fused_attentions"] == 2

    assert operators(path).count("Softmax") == 2
    found = operators(fused)
    assert found.count("MultiHeadAttention") == 2
    assert not {"Softmax", "Transpose", "Reshape"} & set(found), "what only led to the scores is gone"
    assert [file.name for file in fused.parent.iterdir()] == ["net.onnx"], "the weights are not written again"
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    plain = OnnxRuntimeEngine("net", path)
    engine = OnnxRuntimeEngine("net", fused, weights=path.parent)
    for rows in (1, 2, 5):
        given = inputs(rows)
        expected = model(*given.values())
        torch.testing.assert_close(engine(given)["y"], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(engine(given)["y"], plain(given)["y"], rtol=1e-5, atol=1e-5)


def test_scale_and_heads_are_the_models(path: Path, tmp_path: Path) -> None:
    rewrite(path, tmp_path / "fused" / "net.onnx")

    fused = onnx.load(tmp_path / "fused" / "net.onnx", load_external_data=False)
    nodes = [node for node in fused.graph.node if node.domain == DOMAIN]
    assert len(nodes) == 2
    for node in nodes:
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert found == {"num_heads": HEADS, "scale": pytest.approx((WIDTH / HEADS) ** -0.5)}
        scopes = next(p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes")
        assert "own" in scopes or "text" in scopes, "it belongs to its module, so that bisection names it"


def test_attention_with_a_mask_stays_as_it_is(tmp_path: Path) -> None:
    model = Masked()
    path = export(model, tmp_path / "plain" / "net.onnx")
    fused = tmp_path / "fused" / "net.onnx"

    assert rewrite(path, fused)["fused_attentions"] == 1

    assert operators(fused).count("Softmax") == 1
    given = inputs()
    found = OnnxRuntimeEngine("net", fused, weights=path.parent)(given)["y"]
    torch.testing.assert_close(found, model(*given.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", ["scores", "product"])
def test_values_that_others_read_are_kept(path: Path, tmp_path: Path, output: str) -> None:
    """The scores, or the heads' results before they are joined, are an output of the graph, too."""
    path = Path(shutil.copytree(path.parent, tmp_path / "plain")) / "net.onnx"
    model = onnx.load(path, load_external_data=False)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    product = next(node for node in model.graph.node if softmax.output[0] in node.input)
    name = {"scores": softmax, "product": product}[output].output[0]
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(model, path)

    assert rewrite(path, tmp_path / "fused" / "net.onnx")["fused_attentions"] == 1


def test_float16(tmp_path: Path) -> None:
    model = Model()
    path = export(model, tmp_path / "plain" / "net.onnx", dtype=torch.float16)
    fused = tmp_path / "fused" / "net.onnx"

    assert rewrite(path, fused)["fused_attentions"] == 2

    given = inputs(dtype=torch.float16)
    found = OnnxRuntimeEngine("net", fused, weights=path.parent)(given)["y"]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), model(*inputs().values()), rtol=0.01, atol=0.01)


def test_a_graph_without_attention_gets_no_copy(tmp_path: Path) -> None:
    path = export(Model(), tmp_path / "plain" / "net.onnx", opset=23)  # has an operator for attention

    assert rewrite(path, tmp_path / "fused" / "net.onnx")["fused_attentions"] == 0
    assert not (tmp_path / "fused").exists()
