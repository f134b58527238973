"""The step engine on a bundle's own engines: pictures drawn together are those drawn alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icexport import InnerControlPipeline
from icexport.errors import UnsupportedOptionError
from icexport.runtime.schedulers import choose_scheduler
from icexport.runtime.slots import StepRequest

COUNT = 30
SCHEDULERS = ("UniPCMultistep", "EulerAncestralDiscrete", "HeunDiscrete")


@pytest.fixture(params=["onnxruntime", "torch"])
def pipe(tiny_bundle: Path, request: pytest.FixtureRequest) -> InnerControlPipeline:
    return InnerControlPipeline.from_pretrained(tiny_bundle, backend=request.param)


def any_request(pipe: InnerControlPipeline, seed: int) -> StepRequest:
    dice = random.Random(seed)  # noqa: S311  not a secret
    own = pipe.scheduler
    pipe.scheduler = choose_scheduler(dice.choice(SCHEDULERS), own)
    generator = torch.Generator().manual_seed(seed)
    try:
        (found,) = pipe.step_requests(
            f"picture {seed}",
            torch.rand(1, 3, 16, 16, generator=generator),
            num_inference_steps=dice.randint(2, 6),
            guidance_scale=dice.choice((1.0, 7.5)),
            controlnet_conditioning_scale=dice.choice((0.0, 0.7, 1.0)),
            control_guidance_end=dice.choice((0.5, 1.0)),
            guess_mode=dice.random() < 0.2,
            generator=generator,
        )
    finally:
        pipe.scheduler = own
    return found


def drawn(pipe: InnerControlPipeline, request: StepRequest) -> tuple[Tensor, Any]:
    ticket = pipe.step_engine.admit(request)
    pipe.step_engine.drive([ticket])
    assert request.monitor is not None
    return ticket.result(), request.monitor.finish()[0]


def test_mixes_draw_what_is_drawn_alone(pipe: InnerControlPipeline) -> None:
    alone = [drawn(pipe, any_request(pipe, seed)) for seed in range(COUNT)]
    dice, engine = random.Random(1), pipe.step_engine  # noqa: S311  not a secret
    coming = list(range(COUNT))
    running: dict[Any, tuple[int, StepRequest]] = {}
    together = 0
    while coming or running:
        while coming and dice.random() < 0.7:
            seed = coming.pop(0)
            request = any_request(pipe, seed)
            running[engine.admit(request)] = seed, request
        together = max(together, engine.step())
        for ticket in [ticket for ticket in running if ticket.done()]:
            seed, request = running.pop(ticket)
            latents, readings = alone[seed]
            error = (ticket.result() - latents).square().mean() / latents.square().amax()
            assert 10 * torch.log10(1 / error.clamp(min=1e-20)) >= 60
            assert request.monitor is not None
            found = request.monitor.finish()[0]
            assert [(r.index, r.timestep) for r in found] == [(r.index, r.timestep) for r in readings]
            for one, other in zip(found, readings, strict=True):
                assert one.errors == pytest.approx(other.errors, rel=1e-4)
    assert together >= 4


def test_pictures_of_latents(pipe: InnerControlPipeline) -> None:
    request = any_request(pipe, 3)
    latents, _ = drawn(pipe, request)
    (picture,) = pipe.pictures(latents)
    assert picture.size == (16, 16)
    assert pipe.pictures(latents, "pt").shape == (1, 3, 16, 16)


def test_a_scheduler_that_is_not_linear_has_no_requests(pipe: InnerControlPipeline) -> None:
    pipe.scheduler = choose_scheduler("DDIM", pipe.scheduler)
    assert pipe.scheduler.config.clip_sample
    with pytest.raises(UnsupportedOptionError, match="DDIMScheduler is not linear"):
        pipe.step_requests("a", torch.zeros(1, 3, 16, 16), num_inference_steps=2)


def test_a_bundle_that_takes_no_single_picture(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = InnerControlPipeline.from_pretrained(tiny_bundle, backend="torch")
    object.__setattr__(pipe._loaded, "step_engine", None)
    with pytest.raises(UnsupportedOptionError, match=r"takes no single picture: build with --batch-size"):
        _ = pipe.step_engine
    caplog.set_level("INFO", "icexport")
    pipe("a", image=torch.zeros(1, 3, 16, 16), num_inference_steps=1)
    assert "takes no single picture" in caplog.text
