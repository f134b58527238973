"""Engines that are open only while they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from icexport import InnerControlPipeline
from icexport.errors import UnsupportedOptionError
from icexport.runtime import loading

CONTROL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).round()
ENCODE, DRAW, DECODE = {"text_encoder"}, {"controlnet", "unet", "probe"}, {"vae_decoder"}


@pytest.fixture
def open_at_once(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Which engines were open, whenever one was opened."""
    found: list[set[str]] = []
    now: set[str] = set()
    load = loading.load_engine

    def noted(bundle: Any, graph: str, **options: Any) -> Any:
        engine = load(bundle, graph, **options)
        close = engine.close
        engine.close = lambda: (now.discard(graph), close())
        now.add(graph)
        found.append(set(now))
        return engine

    monkeypatch.setattr(loading, "load_engine", noted)
    return found


def draw(bundle: Path, pictures: int = 1, **options: Any) -> list[Any]:
    pipe = InnerControlPipeline.from_pretrained(bundle, backend="onnxruntime", **options)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    seeds = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
    return [pipe("a", CONTROL, generator=seed, **arguments) for seed in seeds]


def test_the_same_pictures_with_one_phase_open(tiny_bundle: Path, open_at_once: list[set[str]]) -> None:
    low = draw(tiny_bundle, 2, low_memory=True)
    phases = list(open_at_once)
    usual = draw(tiny_bundle, 2)
    assert open_at_once.pop() == ENCODE | DRAW | DECODE

    for one, other in zip(low, usual, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.fidelity.scores == other.fidelity.scores
        assert [step.errors for step in one.fidelity.steps] == [step.errors for step in other.fidelity.steps]
    assert all(any(now <= phase for phase in (ENCODE, DRAW, DECODE)) for now in phases)
    assert [now for now in phases if now in (ENCODE, DRAW, DECODE)] == [ENCODE, DRAW, DECODE] * 2


def test_what_needs_all_engines_open_is_refused(tiny_bundle: Path) -> None:
    for option in ("cuda_graph", "probe_kernels"):
        with pytest.raises(UnsupportedOptionError, match=f"{option}|low_memory"):
            draw(tiny_bundle, low_memory=True, **{option: True})


def test_nothing_is_opened_before_it_is_needed(tiny_bundle: Path, open_at_once: list[set[str]]) -> None:
    pipe = InnerControlPipeline.from_pretrained(tiny_bundle, backend="onnxruntime", low_memory=True)
    assert open_at_once == []
    assert pipe.device == torch.device("cpu")
    pipe.vae.engine.close()

    pipe.vae.decode(torch.zeros(1, 4, 8, 8))

    assert open_at_once == [DECODE]
