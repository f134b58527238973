from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.base import TensorSpec
from icexport.errors import UnsupportedOptionError
from icexport.host import memory
from icexport.runtime.components import EngineControlNet, EngineTextEncoder, EngineVae, as_timesteps

CONFIG = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "global_pool_conditions": False,
}
CPU = torch.device("cpu")


class Spy:
    """An engine that remembers what it got and returns one residual for each scale."""

    name, backend, device = "spy", "spy", CPU
    outputs = (TensorSpec("y", torch.float32, ()),)

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, inputs: dict[str, Tensor], _outputs: Any = None) -> dict[str, Tensor]:
        self.calls.append(inputs)
        return {str(i): torch.zeros(1) for i in range(inputs["residual_scale"].shape[1])}


@pytest.mark.parametrize(
    "time", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), np.int64(500), torch.tensor(500.0).double()]
)
def test_timesteps_of_every_kind(time: Any) -> None:
    found = as_timesteps(time, torch.zeros(3, 4, 8, 8, dtype=torch.float16))

    assert found.dtype == torch.float32
    assert found.tolist() == [500, 500, 500]


def test_a_timestep_for_each_sample() -> None:
    assert as_timesteps(torch.tensor([3, 2, 1]), torch.zeros(3, 4, 8, 8)).tolist() == [3, 2, 1]


def run(scale: float, guess: bool) -> tuple[Spy, tuple[list[Tensor], Tensor]]:
    spy = Spy()
    net = EngineControlNet(spy, CONFIG)
    text, control = torch.zeros(2, 12, 16), torch.zeros(2, 3, 16, 16)
    return spy, net(torch.zeros(2, 4, 8, 8), 5, text, control, conditioning_scale=scale, guess_mode=guess)


def test_one_scale_for_each_sample_and_residual() -> None:
    spy, (down, _) = run(0.7, guess=False)

    torch.testing.assert_close(spy.calls[0]["residual_scale"], torch.full((2, 5), 0.7))
    assert len(down) == 4


def test_guess_mode_is_weak_in_the_shallow_layers() -> None:
    spy, _ = run(2.0, guess=True)

    expected = 2 * torch.tensor([0.1, 10**-0.75, 10**-0.5, 10**-0.25, 1.0])
    torch.testing.assert_close(spy.calls[0]["residual_scale"], expected.expand(2, 5))


def test_no_control_runs_no_engine() -> None:
    spy, (down, mid) = run(0.0, guess=False)

    assert spy.calls == []
    assert [tuple(r.shape) for r in (*down, mid)] == [
        (2, 16, 8, 8),
        (2, 16, 8, 8),
        (2, 16, 4, 4),
        (2, 32, 4, 4),
        (2, 32, 4, 4),
    ]
    assert not any(r.any() for r in (*down, mid))


def test_attention_masks_are_refused() -> None:
    encoder = EngineTextEncoder(Spy(), {"num_hidden_layers": 2})

    with pytest.raises(UnsupportedOptionError, match="Pass prompt_embeds instead"):
        encoder(torch.zeros(1, 12, dtype=torch.int64), attention_mask=torch.ones(1, 12))


def test_the_steps_memory_is_given_back_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(memory, "release", lambda: order.append("released"))
    spy: Any = lambda inputs: order.append("decoded") or {"pixels": inputs["latents"]}  # noqa: E731
    spy.outputs = Spy.outputs
    EngineVae(spy, {}).decode(torch.zeros(1, 4, 8, 8))
    assert order == ["released", "decoded"]
