"""The reference engine: an ordinary module, called by position and checked like every other engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engines.base import TensorSpec
from engines.errors import EngineError
from engines.torch_eager import TorchEngine, check

INPUTS = (TensorSpec("x", torch.float32, ("batch", 3)), TensorSpec("shift", torch.float32, (1,)))
OUTPUTS = (TensorSpec("y", torch.float32, ("batch", 2)), TensorSpec("mean", torch.float32, ("batch",)))


class Shifted(nn.Module):
    """A linear layer with dropout, which only evaluation mode makes repeatable."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        y = self.dropout(self.linear(x)) + shift
        return y, y.mean(-1)


def test_runs_the_module_in_evaluation_mode_without_gradients() -> None:
    module = Shifted()
    engine = TorchEngine("shifted", module, INPUTS, OUTPUTS)
    x, shift = torch.randn(4, 3), torch.ones(1)
    got = engine({"shift": shift, "x": x})
    assert list(got) == ["y", "mean"]
    torch.testing.assert_close(got["y"], module.linear(x) + 1)
    assert not got["y"].requires_grad
    assert list(engine({"shift": shift, "x": x}, ["mean"])) == ["mean"]


def test_a_module_that_returns_something_else() -> None:
    engine = TorchEngine("linear", nn.Linear(3, 2), INPUTS[:1], OUTPUTS)
    with pytest.raises(EngineError, match=r"returned Tensor, expected a tuple of 2: y, mean"):
        engine({"x": torch.zeros(1, 3)})
    engine = TorchEngine("shifted", Shifted(), INPUTS, OUTPUTS[:1])
    with pytest.raises(EngineError, match="returned 2 values, expected a tuple of 1: y"):
        engine({"x": torch.zeros(1, 3), "shift": torch.zeros(1)})


def test_weights_are_not_moved() -> None:
    with pytest.raises(EngineError, match=r"run on cpu, but has weights on meta"):
        TorchEngine("shifted", Shifted().to("meta"), INPUTS, OUTPUTS)


def test_closed() -> None:
    engine = TorchEngine("shifted", Shifted(), INPUTS, OUTPUTS)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine({"x": torch.zeros(1, 3), "shift": torch.zeros(1)})


@pytest.mark.parametrize("cuda", [True, False])
def test_check_reports_the_devices(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    availability = check()
    assert availability.usable
    assert availability.version == torch.__version__
    assert ("cuda" in availability.devices) is cuda
    assert bool(availability.fix) is not cuda
