"""What the step engine takes: a picture that does not fit is refused before it can fail another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engines.errors import OutOfMemoryError
from icexport.errors import UsageError
from icexport.graphs.profile import SizeRange
from icexport.host import memory
from icexport.runtime.needs import Needs
from tests.icexport.runtime.test_step_engine import draw, request
from tests.icexport.runtime.toy_engines import FEATURES, PROFILE, TOKENS, Toys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(1, 3, 8, 8)}, "noise of 3 channels, not 4"),
        ({"noise": torch.zeros(2, 4, 8, 8)}, "2 noises, and the scheduler takes 1"),
        ({"noise": torch.zeros(1, 4, 32, 8)}, "a height of 64 px, not 16:16:32"),
        ({"noise": torch.zeros(1, 4, 8, 4)}, "a width of 8 px, not 16:16:32"),
        ({"control_map": torch.zeros(3, 8, 8)}, r"a control map of shape \(3, 8, 8\), not \(3, 16, 16\)"),
        ({"prompt_embeds": torch.zeros(3, TOKENS, FEATURES)}, "3 prompts, not 1 or, with guidance, 2"),
        ({"prompt_embeds": torch.zeros(1, 9, FEATURES)}, "prompts of 9 tokens, not 3"),
        ({"prompt_embeds": torch.zeros(1, TOKENS, 7)}, "prompts of 7 features, not 8"),
        ({"scales": (1.0,)}, "1 scales for 4 calls"),
    ],
    ids=str,
)
def test_a_request_that_does_not_fit_is_refused_and_fails_no_other(change: dict[str, Any], message: str) -> None:
    toys = Toys()
    ticket = toys.engine.admit(request(1))
    with pytest.raises(UsageError, match=message):
        toys.engine.admit(replace(request(2), **change))
    toys.engine.drive([ticket])
    assert torch.equal(ticket.result(), draw(Toys(), request(1))[0])


def test_a_size_that_is_not_listed() -> None:
    toys = Toys(replace(PROFILE, shapes=((16, 16), (32, 32))))
    with pytest.raises(UsageError, match="16x16, 32x32"):
        toys.engine.admit(replace(request(), noise=torch.zeros(1, 4, 8, 16), control_map=torch.zeros(3, 16, 32)))


def test_engines_for_several_pictures_only() -> None:
    with pytest.raises(UsageError, match="take 2:2:4 pictures in a call"):
        Toys(replace(PROFILE, batch=SizeRange(2, 2, 4)))


def test_what_does_not_fit_into_memory_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs({"encode": 0.0, "draw": 0.0, "decode": 0.0}, sample=1.0, picture=1.0)
    toys = Toys(needs=needs)
    many = request(steps=50)
    assert many.state_bytes == 4 * 51 * 4 * 8 * 8
    monkeypatch.setattr(memory, "available", lambda: 10 * 4 * 4 * 8 * 8)
    with pytest.raises(OutOfMemoryError, match="A picture of 50 calls .* at most 9 calls would fit"):
        toys.engine.admit(many)


def test_calls_grow_only_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs({"encode": 0.0, "draw": 0.0, "decode": 0.0}, sample=1000.0, picture=1.0)
    toys = Toys(needs=needs)
    monkeypatch.setattr(memory, "available", lambda: 4 * 1000.0 * 16 * 16)
    draw(toys, *(request(seed) for seed in range(4)))
    assert max(toys.unet.rows) == 4
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    draw(toys, *(request(seed) for seed in range(4)))
    assert max(toys.unet.rows) == 8
