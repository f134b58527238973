"""How long a build takes: what is counted, against what a build really computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from icexport.builder.duration import Work, seconds_needed
from icexport.builder.preflight import _in_words
from icexport.gates.parity_gate import expect_graph
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.split import split
from icexport.host.speed import convolution_rate
from icexport.models.precision import precision
from icexport.models.sizes import size_multiple
from icexport.models.source import ModelSource
from icexport.parity.real_cases import real_cases
from icexport.progress import silent

WEIGHTS = {"unet": 10**9}


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> ModelSource:
    return ModelSource.find("canny", str(tiny_model))


@pytest.fixture(scope="module")
def configs(source: ModelSource) -> dict[str, dict[str, Any]]:
    return {part: source.full_config(part) for part in ("unet", "vae", "controlnet", "text_encoder")}


def profile(batch: str = "1:1:4", height: str = "16:16:32", width: str = "16") -> Profile:
    return Profile(SizeRange.parse(batch), SizeRange.parse(height), SizeRange.parse(width))


@pytest.mark.parametrize("batch", ["1", "2", "1:1:4"])
def test_the_references_work_is_what_torch_does(
    source: ModelSource, configs: dict[str, dict[str, Any]], batch: str
) -> None:
    sizes = profile(batch)
    multiple = size_multiple(source.config("unet"), source.config("vae"))
    # torch counts no attention of its CPU kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for graph in split(source, torch.float32, sizes):
            if graph.name in ("controlnet", "unet", "vae_decoder"):
                expect_graph(graph, None, precision("fp32"), sizes, multiple, silent)

    assert Work.of(configs, sizes).reference == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_pictures_work_is_what_torch_does(source: ModelSource, configs: dict[str, dict[str, Any]]) -> None:
    sizes = profile()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real_cases(list(split(source, torch.float32, sizes)), source, sizes)

    assert Work.of(configs, sizes).picture == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_gate_runs_all_rows_and_its_reference_two_of_them(configs: dict[str, dict[str, Any]]) -> None:
    two, eight = Work.of(configs, profile("2")), Work.of(configs, profile("8"))
    assert eight.reference == two.reference
    assert eight.gate == pytest.approx(4 * two.gate)
    assert two.gate > two.reference


def test_time_grows_with_what_is_asked_for(configs: dict[str, dict[str, Any]]) -> None:
    work = Work.of(configs, profile())

    def seconds(dtype: str = "fp32", **options: Any) -> float:
        return seconds_needed(work, WEIGHTS, precision(dtype), 1e8, **options)

    without = seconds(verify=False)
    assert without == pytest.approx(seconds_needed(work, WEIGHTS, precision("fp32"), 1e15))
    assert without < seconds() < seconds("bf16") < seconds("fp16")
    assert seconds() < seconds(backends=2)
    assert seconds("fp16", verify=False) > without, "what is too large for float16 is looked for without a gate, too"
    assert seconds_needed(work, WEIGHTS, precision("fp32"), 2e8) - without == pytest.approx((seconds() - without) / 2)


def test_minutes_in_words() -> None:
    assert [_in_words(seconds) for seconds in (3, 80, 100, 1553)] == [
        "a minute",
        "a minute",
        "2 minutes",
        "26 minutes",
    ]


def test_the_machines_rate() -> None:
    assert 1e9 < convolution_rate() < 1e14
