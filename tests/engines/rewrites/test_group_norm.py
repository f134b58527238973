"""Group normalisation in rows: the same numbers, as exact in a large picture as in a small one."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from engines.onnxruntime import OnnxRuntimeEngine
from engines.rewrites.rewrite import rewrite
from tests.engines.rewrites.exporting import operators, save

CHANNELS, GROUPS = 16, 4


class Model(nn.Module):
    """A norm of maps and one of tokens, as in a VAE's attention; scale and bias differ between channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.GroupNorm(GROUPS, CHANNELS, eps=0.01)
        self.tokens = nn.GroupNorm(GROUPS, CHANNELS)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.maps(x), self.tokens(x[..., :4, :4].flatten(2))


def export(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    x = {"x": torch.zeros(2, CHANNELS, 16, 24, dtype=dtype)}
    free = {0: Dim("samples"), 2: Dim("rows"), 3: Dim("columns")}
    return save(Model().to(dtype), x, ("maps", "tokens"), (free,), path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("norm") / "plain" / "net.onnx")


@pytest.fixture(scope="module")
def split(plain: Path) -> Path:
    path = plain.parents[1] / "split" / "net.onnx"
    assert rewrite(plain, path) == {"fused_attentions": 0, "split_group_norms": 2}
    return path


@pytest.mark.parametrize("shape", [(1, CHANNELS, 4, 4), (3, CHANNELS, 20, 7)])
def test_it_computes_the_same(plain: Path, split: Path, shape: tuple[int, ...]) -> None:
    assert "GroupNormalization" not in operators(split)
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    found = OnnxRuntimeEngine("net", split, weights=plain.parent)({"x": x})
    with torch.no_grad():
        torch.testing.assert_close(tuple(found.values()), Model()(x), rtol=1e-5, atol=1e-5)


def test_size_costs_no_digits(plain: Path, split: Path) -> None:
    """A group of two million values around 5: the plain operator loses two digits."""
    x = torch.randn((1, CHANNELS, 512, 1024), generator=torch.Generator().manual_seed(0)) + 5
    with torch.no_grad():
        expected, _ = Model().double()(x.double())

    def error(engine: OnnxRuntimeEngine) -> float:
        return float((engine({"x": x})["maps"] - expected).abs().max() / expected.abs().max())

    assert error(OnnxRuntimeEngine("net", split, weights=plain.parent)) < 1e-6
    assert error(OnnxRuntimeEngine("net", plain)) > 1e-5


def test_every_operator_belongs_to_its_module(split: Path) -> None:
    nodes = [n for n in onnx.load(split, load_external_data=False).graph.node if "_split_" in n.name]
    scopes = [p.value for n in nodes for p in n.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
    assert len(scopes) == len(nodes)
    assert sum("maps" in scope for scope in scopes) == sum("tokens" in scope for scope in scopes) == len(nodes) / 2


def test_float16_stays_as_it_is(tmp_path: Path) -> None:
    path = export(tmp_path / "plain" / "net.onnx", dtype=torch.float16)
    assert not any(rewrite(path, tmp_path / "split" / "net.onnx").values())


def test_an_opset_with_a_scale_for_each_group_is_left_alone(plain: Path, tmp_path: Path) -> None:
    model = onnx.load(plain, load_external_data=False)
    next(opset for opset in model.opset_import if not opset.domain).version = 20
    (plain.parent / "old.onnx").write_bytes(model.SerializeToString())
    assert not any(rewrite(plain.parent / "old.onnx", tmp_path / "split" / "net.onnx").values())
