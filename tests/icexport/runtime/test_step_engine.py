"""Pictures that are drawn together are those that are drawn alone, whoever comes and goes meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.errors import EngineError
from icexport.errors import UsageError
from icexport.fidelity.report import StepReading
from icexport.graphs.profile import Profile, SizeRange
from icexport.runtime.coefficients import Coefficients, coefficients
from icexport.runtime.components import residual_scale
from icexport.runtime.slots import NotFiniteError, StepRequest, guide
from tests.icexport.runtime.test_coefficients import make
from tests.icexport.runtime.toy_engines import (
    FACTOR,
    FEATURES,
    PROFILE,
    RESIDUALS,
    TOKENS,
    ToyControlNet,
    Toys,
    ToyUNet,
)

SCHEDULERS = ("DDIM", "UniPCMultistep", "EulerAncestralDiscrete", "HeunDiscrete", "LCM")


def weights(name: str = "DDIM", steps: int = 4) -> Coefficients:
    return coefficients(make(name, {}), steps)


def request(
    seed: int = 0,
    *,
    scheduler: str = "DDIM",
    steps: int = 4,
    guided: bool = True,
    height: int = 16,
    scale: float = 1.0,
    **options: Any,
) -> StepRequest:
    """Return a picture that its seed decides."""
    generator = torch.Generator().manual_seed(seed)
    numbers = weights(scheduler, steps)
    cells = height // FACTOR
    return StepRequest(
        numbers,
        torch.randn(1 + numbers.draws, 4, cells, cells, generator=generator),
        torch.randn(2 if guided else 1, TOKENS, FEATURES, generator=generator),
        torch.rand(3, height, height, generator=generator),
        options.pop("scales", (scale,) * numbers.calls),
        guidance_scale=4.0,
        **options,
    )


def drawn_alone(wanted: StepRequest) -> Tensor:
    """Draw a picture as diffusers' loop does, with nothing of the step engine but the weights."""
    controlnet, unet = ToyControlNet(), ToyUNet()
    numbers, rows = wanted.coefficients, wanted.rows
    parts = list(wanted.noise)
    latents = parts[0]
    for call in range(numbers.calls):
        sample = torch.tensordot(numbers.inputs[call, : len(parts)], torch.stack(parts), 1).expand(rows, -1, -1, -1)
        common = {"sample": sample, "timestep": numbers.timesteps[call].expand(rows)}
        common["prompt_embeds"] = wanted.prompt_embeds
        scale = residual_scale(len(RESIDUALS), wanted.scales[call], wanted.guess_mode).expand(rows, -1).clone()
        if wanted.guess_mode and rows == 2:
            scale[0] = 0
        control = {"control_map": wanted.control_map.expand(rows, -1, -1, -1), "residual_scale": scale}
        found = unet(common | controlnet(common | control))
        parts.append(guide(found["noise_pred"], wanted))
        latents = torch.tensordot(numbers.latents[call, : len(parts)], torch.stack(parts), 1)
    return latents[None]


def draw(toys: Toys, *requests: StepRequest) -> list[Tensor]:
    tickets = [toys.engine.admit(one) for one in requests]
    toys.engine.drive(tickets)
    return [ticket.result() for ticket in tickets]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guided": False},
        {"scale": 0.5},
        {"scale": 0.0},
        {"guess_mode": True},
        {"guess_mode": True, "guided": False},
        {"guidance_rescale": 0.7},
    ],
    ids=str,
)
def test_a_picture_alone(scheduler: str, options: dict[str, Any]) -> None:
    wanted = request(3, scheduler=scheduler, **options)
    (found,) = draw(Toys(), wanted)
    torch.testing.assert_close(found, drawn_alone(wanted), rtol=1e-5, atol=1e-5)


def test_a_window_of_control() -> None:
    toys, wanted = Toys(), request(scales=(0.0, 1.0, 1.0, 0.0))
    (found,) = draw(toys, wanted)
    torch.testing.assert_close(found, drawn_alone(wanted), rtol=1e-5, atol=1e-5)
    assert toys.controlnet.rows == [2, 2]
    assert toys.unet.rows == [2] * 4


def test_only_rows_with_control_run_the_controlnet() -> None:
    toys = Toys()
    several = [request(1), request(2, guess_mode=True), request(3, guided=False), request(4, scale=0.0)]
    found = draw(toys, *several)
    assert set(toys.unet.rows) == {7}
    assert set(toys.controlnet.rows) == {2 + 1 + 1}
    for one, other in zip(found, several, strict=True):
        torch.testing.assert_close(one, drawn_alone(other), rtol=1e-5, atol=1e-5)


def readings(found: StepRequest) -> list[StepReading]:
    assert found.monitor is not None
    return found.monitor.finish()[0]


def any_request(dice: random.Random, toys: Toys) -> StepRequest:
    """Return a picture as users might ask for one."""
    scheduler, steps = dice.choice(SCHEDULERS), dice.randint(1, 8)
    wanted = request(
        dice.randrange(10**6),
        scheduler=scheduler,
        steps=max(steps, 2),
        guided=dice.random() < 0.6,
        height=dice.choice((16, 16, 16, 32)),
        guess_mode=dice.random() < 0.2,
        guidance_rescale=dice.choice((0.0, 0.5)),
    )
    calls = wanted.coefficients.calls
    begin, end = sorted((dice.randint(0, calls), dice.randint(0, calls)))
    scales = [dice.choice((0.0, 0.5, 1.0)) if begin <= call < end else 0.0 for call in range(calls)]
    read = [call for call in range(calls) if dice.random() < 0.5]
    return replace(wanted, scales=scales, monitor=toys.monitor(wanted.control_map, read))


def test_500_mixes_draw_what_is_drawn_alone() -> None:
    dice = random.Random(0)  # noqa: S311  not a secret
    toys, alone = Toys(pictures=12), Toys()
    waiting = [any_request(dice, toys) for _ in range(500)]
    running: dict[Future[Tensor], StepRequest] = {}
    compared = thrown_away = 0
    while waiting or running:
        while waiting and dice.random() < 0.6:
            wanted = waiting.pop()
            running[toys.engine.admit(wanted)] = wanted
        if running and dice.random() < 0.03:
            assert toys.engine.cancel(dice.choice(list(running)))
        toys.engine.step()
        for ticket in [ticket for ticket in running if ticket.done()]:
            wanted = running.pop(ticket)
            if ticket.cancelled():
                thrown_away += 1
                continue
            copy = replace(wanted, monitor=alone.monitor(wanted.control_map, sorted(wanted.monitor._steps)))  # type: ignore[union-attr]
            (expected,) = draw(alone, copy)
            assert torch.equal(ticket.result(), expected)
            assert readings(wanted) == readings(copy)
            compared += 1
    assert compared + thrown_away == 500
    assert compared > 400
    assert thrown_away > 10
    assert max(toys.unet.rows) > 6, "hardly anything was drawn together"


def test_readings_stay_with_their_picture_when_others_come_and_go() -> None:
    toys, alone = Toys(pictures=3), Toys()
    several = [request(seed, steps=2 + seed % 5) for seed in range(30)]
    several = [replace(one, monitor=toys.monitor(one.control_map, range(9))) for one in several]
    draw(toys, *several)
    for one in several:
        copy = replace(one, monitor=alone.monitor(one.control_map, range(9)))
        draw(alone, copy)
        assert readings(one) == readings(copy)
        assert len(readings(one)) == one.coefficients.calls
    assert len({tuple(reading.errors) for one in several for reading in readings(one)}) > 100


def test_what_is_not_read_is_not_computed() -> None:
    toys = Toys()
    one, other = request(1), request(2)
    draw(toys, replace(one, monitor=toys.monitor(one.control_map, [3])), other)
    assert toys.probe.rows == [1]


def test_the_probe_takes_no_more_pictures_than_fit() -> None:
    toys = Toys()
    several = [request(seed, guided=False) for seed in range(8)]
    draw(toys, *(replace(one, monitor=toys.monitor(one.control_map, [0])) for one in several))
    assert toys.unet.rows == [8] * 4
    assert toys.probe.rows == [4, 4]


def test_a_cancelled_picture_leaves_the_others() -> None:
    toys = Toys()
    first, second, third = (toys.engine.admit(request(seed)) for seed in range(3))
    toys.engine.step()
    assert toys.engine.cancel(second)
    assert toys.engine.cancel(second), "a second time"
    toys.engine.drive([first, third])
    assert not toys.engine.cancel(first), "after its end"
    with pytest.raises(CancelledError):
        second.result()
    assert torch.equal(first.result(), draw(Toys(), request(0))[0])
    assert toys.unet.rows[-1] == 4
    assert draw(toys, request(1))[0].isfinite().all(), "and those that come later"


def test_a_retired_picture_has_the_latents_of_then() -> None:
    toys = Toys()
    ticket = toys.engine.admit(request(1))
    assert toys.engine.calls(ticket) == 0
    for _ in range(2):
        toys.engine.step()
    assert toys.engine.calls(ticket) == 2
    assert toys.engine.retire(ticket)
    assert not toys.engine.retire(ticket)
    assert toys.engine.calls(ticket) is None
    assert ticket.result().shape == (1, 4, 8, 8)
    assert not torch.equal(ticket.result(), draw(Toys(), request(1))[0])
    early = toys.engine.admit(request(2))
    assert toys.engine.retire(early)
    assert early.cancelled()
    assert toys.engine.step() == 0


def test_nan_ends_one_picture() -> None:
    toys = Toys()
    bad = replace(request(1), noise=torch.full((1, 4, 8, 8), torch.nan))
    good = request(2)
    tickets = [toys.engine.admit(one) for one in (bad, good)]
    toys.engine.drive(tickets)
    with pytest.raises(NotFiniteError) as caught:
        tickets[0].result()
    assert caught.value.latents.shape == (1, 4, 8, 8)
    assert torch.equal(tickets[1].result(), draw(Toys(), good)[0])


def test_an_error_in_one_reading_ends_one_picture() -> None:
    toys = Toys()
    bad, good = request(1), request(2)
    monitor = toys.monitor(bad.control_map, [1])
    monitor._mean_error = lambda _reading: [][0]
    tickets = [toys.engine.admit(one) for one in (replace(bad, monitor=monitor), good)]
    toys.engine.drive(tickets)
    assert isinstance(tickets[0].exception(), IndexError)
    assert torch.equal(tickets[1].result(), draw(Toys(), good)[0])


def test_an_engine_that_dies_ends_the_pictures_of_its_call() -> None:
    toys = Toys()
    tickets = [toys.engine.admit(request(seed)) for seed in range(6)]
    toys.engine.step()
    toys.unet.error = EngineError("died")
    toys.engine.step()
    toys.unet.error = None
    toys.engine.drive(tickets)
    died = [isinstance(ticket.exception(), EngineError) for ticket in tickets]
    assert 0 < sum(died) < 6
    for seed, (ticket, dead) in enumerate(zip(tickets, died, strict=True)):
        if not dead:
            assert torch.equal(ticket.result(), draw(Toys(), request(seed))[0])
    assert draw(toys, request(9))[0].isfinite().all(), "the next one is drawn"


def test_an_interrupt_leaves_the_pictures_as_they_were() -> None:
    toys = Toys()
    mine, other = (toys.engine.admit(request(seed)) for seed in range(2))
    toys.engine.step()
    toys.unet.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        toys.engine.drive([mine])
    assert mine.cancelled(), "nobody waits for it any more"
    toys.unet.error = None
    toys.engine.drive([other])
    assert torch.equal(other.result(), draw(Toys(), request(1))[0])


def test_an_interrupt_at_the_end_of_a_picture_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    toys = Toys()
    ticket = toys.engine.admit(request())
    for _ in range(3):
        toys.engine.step()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "set_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            toys.engine.step()
    assert not ticket.done()
    assert toys.engine.step() == 0
    assert torch.equal(ticket.result(), draw(Toys(), request())[0])


def test_an_error_while_watching_throws_the_pictures_away() -> None:
    toys = Toys()
    ticket = toys.engine.admit(request())

    def watch() -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        toys.engine.drive([ticket], watch)
    assert ticket.cancelled()


def test_another_engines_ticket() -> None:
    with pytest.raises(UsageError, match="another engine's"):
        Toys().engine.drive([Toys().engine.admit(request())])


def test_short_pictures_do_not_wait_for_long_ones() -> None:
    toys = Toys(Profile(SizeRange(1, 1, 1), PROFILE.height, PROFILE.width))
    long = [toys.engine.admit(request(seed, steps=50)) for seed in range(3)]
    for _ in range(5):
        toys.engine.step()
    short = toys.engine.admit(request(9, steps=4))
    toys.engine.drive([short])
    assert not any(ticket.done() for ticket in long)
    assert len(toys.unet.rows) <= 5 + 4 * 4, "all take turns"


def test_threads_share_the_engine() -> None:
    toys, alone = Toys(), Toys()
    expected = [draw(alone, request(seed))[0] for seed in range(40)]
    together = threading.Barrier(8)

    def work(thread: int) -> list[Tensor]:
        together.wait()
        return [draw(toys, request(seed))[0] for seed in range(5 * thread, 5 * thread + 5)]

    with ThreadPoolExecutor(8) as pool:
        found = [one for some in pool.map(work, range(8)) for one in some]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert max(toys.unet.rows) > 2, "no two threads shared a call"


class HostReads(TorchDispatchMode):
    """Counts how often Python asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[HostReads]:
    with HostReads() as found:
        yield found


def test_nothing_is_read_from_the_device_between_steps() -> None:
    toys = Toys()
    wanted = [request(1, steps=6), request(2, steps=6, scheduler="UniPCMultistep", guess_mode=True)]
    wanted = [replace(one, monitor=toys.monitor(one.control_map, range(6))) for one in wanted]
    tickets = [toys.engine.admit(one) for one in wanted]
    with host_reads() as found:
        for _ in range(5):
            toys.engine.step()
        assert found.count == 0
        toys.engine.step()
        assert found.count == len(tickets), "each picture is looked at once, at its end"
    with host_reads() as found:
        torch.zeros(1).item()
        assert found.count == 1
