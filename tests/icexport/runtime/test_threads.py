"""Several threads on one pipeline and on its forks: every picture and every report as if it were alone."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icexport.errors import UnsupportedOptionError, UsageError
from icexport.fidelity.report import FidelityReport
from icexport.runtime.pipeline import InnerControlPipeline
from icexport.runtime.schedulers import choose_scheduler

THREADS, PICTURES = 8, 20
Drawn = tuple[Tensor, dict[str, Any]]


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    found = InnerControlPipeline.from_pretrained(tiny_bundle, backend="onnxruntime")
    found.set_progress_bar_config(disable=True)
    return found


def request(pipe: InnerControlPipeline, number: int) -> Drawn:
    """One of many requests, each with its own map, seed, prompt, number of steps and calls to read."""
    control = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(number))
    found: Any = pipe(
        f"picture {number}",
        image=control,
        num_inference_steps=2 + number % 3,
        guidance_scale=7.5 if number % 2 else 1.0,
        generator=torch.Generator().manual_seed(number),
        output_type="pt",
        check_fidelity=True if number % 3 else [1],
    )
    report: FidelityReport = found.fidelity
    assert report
    return found.images, report.to_json()


@pytest.mark.parametrize("scheduler", ["UniPCMultistep", "DDIM", "HeunDiscrete", "EulerAncestralDiscrete"])
@pytest.mark.parametrize("forked", [False, True], ids=["one pipeline", "forks"])
def test_as_if_alone(pipe: InnerControlPipeline, scheduler: str, forked: bool) -> None:
    own = pipe.fork()
    own.scheduler = choose_scheduler(scheduler, own.scheduler)
    alone = [request(own, number) for number in range(PICTURES)]
    forks = threading.local()

    def draw(number: int) -> Drawn:
        if not forked:
            return request(own, number)
        if not hasattr(forks, "pipe"):
            forks.pipe = own.fork()
        return request(forks.pipe, number)

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(draw, range(PICTURES)))

    for (picture, report), (expected, wanted) in zip(together, alone, strict=True):
        assert torch.equal(picture, expected)
        assert report == wanted


def test_a_fork_shares_engines_and_nothing_of_a_call(pipe: InnerControlPipeline) -> None:
    other = pipe.fork()

    assert other.unet.engine is pipe.unet.engine
    assert other.vae.engine is pipe.vae.engine
    assert other.unet is not pipe.unet
    assert other.unet.turn is not pipe.unet.turn
    assert other.scheduler is not pipe.scheduler
    assert other.scheduler.config == pipe.scheduler.config
    assert (other.bundle, other.backend, other.device) == (pipe.bundle, pipe.backend, pipe.device)
    pipe.condition = pipe.condition.with_options(low_threshold=30.0)
    assert pipe.fork().condition == pipe.condition != other.condition


def test_forks_take_turns_where_engines_cannot_be_shared(tiny_bundle: Path) -> None:
    low = InnerControlPipeline.from_pretrained(tiny_bundle, backend="torch", low_memory=True)
    assert low.fork().unet.turn is low.unet.turn


def test_a_call_within_a_call_is_refused(pipe: InnerControlPipeline) -> None:
    def again(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        request(pipe, 0)
        return tensors

    with pytest.raises(UsageError, match=r"called from within its own call.*pipe\.fork\(\)"):
        pipe("a", image=torch.zeros(1, 3, 16, 16), num_inference_steps=1, callback_on_step_end=again)
    request(pipe, 0)  # and it can be called again


def test_pipelines_of_the_same_components_take_turns(pipe: InnerControlPipeline) -> None:
    expected = request(pipe, 4)
    for other in (type(pipe)(**pipe.components), InnerControlPipeline.from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert other.unet.turn is pipe.unet.turn
        picture, report = request(other, 4)
        assert torch.equal(picture, expected[0])
        assert report == expected[1]


def test_a_pickle_loads_the_bundle_again(pipe: InnerControlPipeline) -> None:
    other = pickle.loads(pickle.dumps(pipe))  # noqa: S301  our own
    other.set_progress_bar_config(disable=True)

    assert other.unet.engine is not pipe.unet.engine
    assert torch.equal(request(other, 4)[0], request(pipe, 4)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked(pipe: InnerControlPipeline) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pipe("a", image=torch.zeros(1, 3, 16, 16))
            text = "nothing was raised"
        except UnsupportedOptionError as error:
            text = str(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert "loaded before this process was forked" in file.read()
    os.waitpid(child, 0)


class TestReadings:
    def draw(self, pipe: InnerControlPipeline, **options: Any) -> FidelityReport:
        given = {"image": torch.zeros(1, 3, 16, 16), "num_inference_steps": 6, **options}
        report: FidelityReport = pipe("a", **given).fidelity
        return report

    @pytest.mark.parametrize("steps", [[99], [-1], [0, 6], {2, 7}, ["0"]])
    def test_calls_that_will_not_be_made(self, pipe: InnerControlPipeline, steps: Any) -> None:
        with pytest.raises(UsageError, match=r"check_fidelity=\[.*\]: the UNet is called 6 times here.* 0 to 5"):
            self.draw(pipe, check_fidelity=steps)

    def test_schedulers_that_call_the_unet_more_often(self, pipe: InnerControlPipeline) -> None:
        own = pipe.fork()
        own.scheduler = choose_scheduler("HeunDiscrete", own.scheduler)
        report = self.draw(own)
        assert report
        assert len(report.steps) == report.expected == own.num_timesteps > 6

    @pytest.mark.parametrize(("asked", "expected"), [(True, 6), ([0, 5], 2), ([3, 3], 1), ([], 0)])
    def test_as_many_as_asked_for(self, pipe: InnerControlPipeline, asked: Any, expected: int) -> None:
        report = self.draw(pipe, check_fidelity=asked)
        assert report
        assert report.expected == len(report.steps) == expected
        assert report.to_json()["readings_expected"] == expected

    def test_a_call_that_ends_early_does_not_pass(self, pipe: InnerControlPipeline) -> None:
        def stop(running: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            running._interrupt = step == 2
            return tensors

        report = self.draw(pipe, callback_on_step_end=stop)
        assert not report
        assert len(report.steps) == 3


def test_the_first_error_of_a_thread_lets_the_others_go_on(pipe: InnerControlPipeline) -> None:
    expected = request(pipe, 1)

    def wrong() -> None:
        pipe("a", image=torch.full((1, 3, 16, 16), 2.0))

    def right() -> Drawn:
        return request(pipe, 1)

    works: list[Callable[[], Any]] = [wrong, right, wrong, right]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for work in works]
    assert [isinstance(future.exception(), UsageError) for future in futures] == [True, False, True, False]
    assert all(torch.equal(futures[i].result()[0], expected[0]) for i in (1, 3))
