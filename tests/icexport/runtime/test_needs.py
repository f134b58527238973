"""What does not fit into memory is known before it is tried."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.errors import OutOfMemoryError
from icexport import InnerControlPipeline
from icexport.bundle.store import Bundle
from icexport.runtime import needs
from icexport.runtime.needs import Needs

CONTROL = torch.ones(1, 3, 16, 16)


def needs_of(bundle: Path) -> Needs:
    found = Needs.of(Bundle(bundle).manifest, "onnxruntime", "cpu")
    assert found is not None
    return found


def load(bundle: Path, **options: Any) -> InnerControlPipeline:
    pipe = InnerControlPipeline.from_pretrained(bundle, backend="onnxruntime", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many bytes are free."""
    return lambda value: monkeypatch.setattr(needs, "available", lambda: value)


def test_weights_count_where_their_engine_is_open(tiny_bundle: Path) -> None:
    manifest, found = Bundle(tiny_bundle).manifest, needs_of(tiny_bundle)
    weights = {name: sum(graph.dtypes.values()) for name, graph in manifest.graphs.items()}
    each = found.needed(0, 0, 0) / sum(weights.values())
    assert each >= 4, "bytes of a float32 weight"
    together = weights["controlnet"] + weights["unet"] + weights["probe"]
    assert found.needed(0, 0, 0, low_memory=True) == pytest.approx(each * together)
    assert found.needed(0, 0, 0, opened=True) == 0


def test_drawing_grows_with_pixels_and_pictures(tiny_bundle: Path) -> None:
    found = needs_of(tiny_bundle)
    one = found.needed(16, 16, 1, opened=True)
    assert found.needed(32, 48, 2, opened=True) == pytest.approx(12 * one)
    assert one >= 4 * 16 * 16 * 16, "one map of the decoder's last level"


def test_with_low_memory_each_phase_counts_alone() -> None:
    found = Needs({"encode": 2.0, "draw": 6.0, "decode": 1.0}, sample=1.0, picture=3.0)
    assert found.needed(1, 1, 1) == 9 + 3
    assert found.needed(1, 1, 1, low_memory=True) == 6 + 2, "the decoder needs more beside fewer weights"
    assert found.needed(1, 10, 1, low_memory=True) == 1 + 30


def test_other_devices_backends_and_families_are_not_known(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    assert Needs.of(manifest, "onnxruntime", "cuda") is None
    assert Needs.of(manifest, "torch", "cpu") is None
    manifest.graphs["refiner"] = manifest.graphs["unet"]
    assert Needs.of(manifest, "onnxruntime", "cpu") is None, "a graph of another family"


def test_low_memory_is_chosen_where_it_is_needed(
    tiny_bundle: Path, free: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = needs_of(tiny_bundle)
    enough = found.needed(16, 16, 1)
    free(enough + 1)
    assert not load(tiny_bundle)._loaded.low_memory
    free(enough - 1)
    with caplog.at_level(logging.WARNING, "icexport"):
        assert load(tiny_bundle)._loaded.low_memory
    assert "each engine is open only while it is needed" in caplog.text
    assert load(tiny_bundle, preflight=False)._loaded.low_memory is False
    free(found.needed(16, 16, 1, low_memory=True) - 1)
    for wanted in (None, True, False):
        with pytest.raises(OutOfMemoryError, match=r"one picture, 16 x 16 px, takes about .* --no-preflight"):
            load(tiny_bundle, low_memory=wanted)
    load(tiny_bundle, preflight=False)


def test_what_the_user_says_counts(tiny_bundle: Path, free: Any) -> None:
    free(10**12)
    assert load(tiny_bundle, low_memory=True)._loaded.low_memory


def test_a_call_that_does_not_fit_is_refused_before_the_work(tiny_bundle: Path, free: Any) -> None:
    free(10**12)
    pipe, low = load(tiny_bundle), load(tiny_bundle, low_memory=True)
    found = needs_of(tiny_bundle)
    free(found.needed(16, 16, 3, opened=True))
    with pytest.raises(OutOfMemoryError, match="4 pictures at a time, 16 x 16 px"):
        pipe("a", CONTROL, num_images_per_prompt=4, num_inference_steps=1)
    assert len(pipe("a", CONTROL, num_images_per_prompt=2, num_inference_steps=1).images) == 2
    with pytest.raises(OutOfMemoryError):
        low("a", CONTROL, num_inference_steps=1)
    free(found.needed(16, 16, 2, low_memory=True))
    assert len(low("a", CONTROL, num_images_per_prompt=2, num_inference_steps=1).images) == 2
