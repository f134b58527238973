"""The step engine in place of diffusers' loop: when it draws, and what a user sees of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

from icexport import InnerControlPipeline
from icexport.errors import UnsupportedOptionError, UsageError
from icexport.runtime.drawing import Request, draw
from icexport.runtime.step_engine import StepEngine

CONTROL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).round()


@pytest.fixture
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    found = InnerControlPipeline.from_pretrained(tiny_bundle, backend="onnxruntime")
    found.set_progress_bar_config(disable=True)
    return found


def call(pipe: InnerControlPipeline, **options: Any) -> Any:
    given = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe("ab", image=CONTROL, **(given | options))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "own loop draws this" in record.getMessage()]


def test_auto_says_why_it_takes_diffusers_loop(pipe: InnerControlPipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "icexport")
    call(pipe)
    assert told(caplog) == []
    call(pipe, callback_on_step_end=lambda _pipe, _step, _time, tensors: tensors)
    assert told(caplog) == ["diffusers' own loop draws this: callback_on_step_end may change tensors of the loop."]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    call(pipe)
    assert "DDIMScheduler is not linear in its latents" in told(caplog)[-1]


def test_fast_is_never_something_else(pipe: InnerControlPipeline) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"loop='fast' cannot draw this: callback_on_step_end may change"):
        call(pipe, loop="fast", callback_on_step_end=lambda _pipe, _step, _time, tensors: tensors)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=True)
    with pytest.raises(UnsupportedOptionError, match="DDIMScheduler is not linear"):
        call(pipe, loop="fast")
    assert len(call(pipe).images) == 1


def test_a_loop_that_is_not_there(pipe: InnerControlPipeline) -> None:
    with pytest.raises(UsageError, match="loop='quick': choose auto, diffusers, fast"):
        call(pipe, loop="quick")


def test_both_loops_report_the_same(pipe: InnerControlPipeline) -> None:
    fast, theirs = (
        call(pipe, loop=loop, num_images_per_prompt=2, num_inference_steps=5, check_fidelity=[0, 3, 4])
        for loop in ("fast", "diffusers")
    )
    assert fast.fidelity.scores == pytest.approx(theirs.fidelity.scores, abs=1e-3)
    assert [step.index for step in fast.fidelity.steps] == [0, 3, 4]
    for one, other in zip(fast.fidelity.steps, theirs.fidelity.steps, strict=True):
        assert (one.index, one.timestep) == (other.index, other.timestep)
        assert one.errors == pytest.approx(other.errors, rel=1e-4)
    torch.testing.assert_close(
        torch.from_numpy(fast.fidelity.heat_map), torch.from_numpy(theirs.fidelity.heat_map), rtol=1e-3, atol=1e-4
    )
    assert fast.fidelity.expected == theirs.fidelity.expected == 3


def test_a_callback_that_only_looks_on(pipe: InnerControlPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def look(_pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert tensors == {}
        seen.append((step, float(time)))
        return tensors

    options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": []}
    call(pipe, loop="fast", **options)
    fast, seen = seen, []
    call(pipe, loop="diffusers", **options)
    assert fast == seen
    assert len(fast) == 3


def test_a_callback_cannot_change_what_it_was_not_given(pipe: InnerControlPipeline) -> None:
    def meddle(*_: Any) -> dict[str, Tensor]:
        return {"latents": torch.zeros(1, 4, 8, 8)}

    with pytest.raises(UsageError, match=r"returned latents, .*name them in callback_on_step_end_tensor_inputs"):
        call(pipe, callback_on_step_end=meddle, callback_on_step_end_tensor_inputs=[])
    assert len(call(pipe).images) == 1, "and the pipeline goes on"


@pytest.mark.parametrize(
    ("scheduler", "steps", "total"),
    [
        (DDIMScheduler, {"num_inference_steps": 4}, 4),
        (HeunDiscreteScheduler, {"num_inference_steps": 4}, 4),
        (EulerDiscreteScheduler, {"timesteps": [900, 600, 400, 10]}, 4),
    ],
)
def test_the_bar_moves_as_in_diffusers_loop(
    pipe: InnerControlPipeline, scheduler: Any, steps: dict[str, Any], total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, clip_sample=False)
    moves: list[tuple[str, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            moves.append(("total", total))

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            moves.append(("end", 0))

        def update(self) -> None:
            moves.append(("update", 1))

    monkeypatch.setattr(pipe, "progress_bar", lambda total: Bar(total))
    call(pipe, loop="fast", **steps)
    fast = moves.copy()
    moves.clear()
    call(pipe, loop="diffusers", **steps)
    assert fast == moves
    assert moves[0] == ("total", total)


def test_an_interrupt_ends_with_the_latents_of_then(pipe: InnerControlPipeline) -> None:
    def stop(running: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        running._interrupt = step == 1
        return tensors

    options = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": [], "num_inference_steps": 6}
    fast, theirs = (call(pipe, loop=loop, output_type="latent", **options) for loop in ("fast", "diffusers"))
    torch.testing.assert_close(fast.images, theirs.images, rtol=1e-4, atol=1e-4)
    assert not fast.fidelity
    assert len(fast.fidelity.steps) == len(theirs.fidelity.steps) == 2
    assert len(call(pipe).fidelity.steps) == 3, "the next call is not interrupted"


def test_how_many_calls_are_made_is_known(pipe: InnerControlPipeline) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    call(pipe, num_inference_steps=4)
    assert pipe.num_timesteps == 7


@pytest.mark.parametrize("options", [{"generator": [torch.Generator()] * 2}, {"latents": torch.zeros(2, 4, 8, 8)}])
def test_what_does_not_fit_the_pictures(pipe: InnerControlPipeline, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="2 generators for 1 pictures|latents have shape"):
        call(pipe, **options)


def test_latents_that_are_not_finite_do_not_pass(pipe: InnerControlPipeline) -> None:
    found = call(pipe, loop="fast", latents=torch.full((1, 4, 8, 8), torch.nan), output_type="latent")
    assert found.images.isnan().all()
    assert not found.fidelity


def test_draw_needs_no_tensors(pipe: InnerControlPipeline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "icexport")
    profile = pipe.bundle.manifest.profile.batch
    draw(pipe, CONTROL, Request("ab", range(2), steps=2), calls=profile, callback=lambda *_: {})
    assert told(caplog) == []


def test_forks_and_pipelines_of_the_same_components_share_one_engine(pipe: InnerControlPipeline) -> None:
    engine = pipe._loaded.step_engine
    assert isinstance(engine, StepEngine)
    assert pipe.fork()._loaded.step_engine is engine
    assert InnerControlPipeline.from_pipe(pipe)._loaded.step_engine is engine
