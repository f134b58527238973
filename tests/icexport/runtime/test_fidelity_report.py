from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor
from torch.nn import functional as F

from engines.onnxruntime import OnnxRuntimeEngine
from icexport import InnerControlPipeline, conditions
from icexport.errors import ConditionError
from icexport.models.source import ModelSource
from icexport.models.taps import Taps

CONTROL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).round()
STEPS = 3


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    pipe = InnerControlPipeline.from_pretrained(tiny_bundle, backend="onnxruntime")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **options: Any) -> Any:
    defaults = {"prompt": "ab", "image": CONTROL, "num_inference_steps": STEPS, "output_type": "pt"}
    return pipe(**(defaults | {"generator": torch.Generator().manual_seed(0)} | options))


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_readings_are_those_of_torch(pipe: InnerControlPipeline, tiny_model: Path, guidance: float) -> None:
    """Hooks in diffusers' own pipeline: probe on the conditional half of its UNet, errors by hand."""
    source = ModelSource.find("canny", str(tiny_model))
    probe = source.probe_model(torch.float32)
    assert probe is not None
    controlnet = ControlNetModel.from_pretrained(tiny_model / "controlnet-canny")
    theirs = StableDiffusionControlNetPipeline.from_pretrained(tiny_model, controlnet=controlnet, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    unet, taps = theirs.unet, Taps(theirs.unet, probe.config.tap_kind)
    forward = unet.forward
    expected: list[tuple[float, list[float]]] = []
    maps: list[Tensor] = []

    def spy(sample: Tensor, time: Tensor, *args: Any, **kwargs: Any) -> Any:
        with taps.record() as tapped:
            result = forward(sample, time, *args, **kwargs)
        embedding = unet.time_embedding(unet.time_proj(time.reshape(1))).expand(2, -1)
        with torch.no_grad():
            reading = probe([tap[-2:] for tap in tapped], embedding) / 2 + 0.5
        difference = (F.interpolate(reading, (16, 16), mode="bilinear") - CONTROL) ** 2
        expected.append((float(time), difference.mean((1, 2, 3)).tolist()))
        maps.append(F.avg_pool2d(difference.mean(1), 2))
        return result

    # Taps hooks the module's own calls, so the spy goes below them.
    unet.forward = spy
    # Texts so far apart that the two halves of the batch are read differently.
    text = 30 * torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(3))
    options = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": -text, "guidance_scale": guidance}
    with torch.no_grad():
        call(theirs, **options, num_images_per_prompt=2)

    report = call(pipe, **options, num_images_per_prompt=2).fidelity

    assert [step.index for step in report.steps] == list(range(STEPS))
    assert [step.timestep for step in report.steps] == [time for time, _ in expected]
    np.testing.assert_allclose([s.errors for s in report.steps], [errors for _, errors in expected], rtol=1e-4)
    assert report.heat_map.shape == (2, 8, 8)
    assert report.heat_map.dtype == np.float32
    np.testing.assert_allclose(report.heat_map, maps[-1], rtol=1e-3, atol=1e-5)
    first, second = report.steps[0].errors
    assert first != second


def test_scores_are_those_of_the_condition(pipe: InnerControlPipeline) -> None:
    found = call(pipe, prompt=["a", "b"], image=torch.cat([CONTROL, 1 - CONTROL]))

    expected = conditions.get("canny").score(found.images, torch.cat([CONTROL, 1 - CONTROL]))
    assert found.fidelity.scores == expected.tolist()
    assert (found.fidelity.metric, found.fidelity.unit) == (conditions.Canny.metric, conditions.Canny.unit)
    assert found.fidelity.higher_is_better == conditions.Canny.higher_is_better
    assert bool(found.fidelity) is True
    assert found.fidelity.calibrated is False


def test_a_picture_that_obeys_scores_better(pipe: InnerControlPipeline) -> None:
    pictures = call(pipe).images
    own_edges = conditions.get("canny").extract_batch(pictures)

    obeyed = call(pipe, callback_on_step_end=None)  # the same pictures: same seed
    assert torch.equal(obeyed.images, pictures)
    assert float(conditions.get("canny").score(pictures, own_edges)) == pytest.approx(1.0)
    assert obeyed.fidelity.scores[0] < 1.0


def test_chosen_steps(pipe: InnerControlPipeline) -> None:
    full = call(pipe).fidelity
    some = call(pipe, check_fidelity={0, 2}).fidelity

    assert some.steps == [full.steps[0], full.steps[2]]
    np.testing.assert_array_equal(some.heat_map, full.heat_map)
    none = call(pipe, check_fidelity=()).fidelity
    assert none.steps == []
    assert none.heat_map is None
    assert none.scores == full.scores


def test_second_order_schedulers_are_read_at_every_call(
    pipe: InnerControlPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import HeunDiscreteScheduler

    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))

    assert [step.index for step in call(pipe).fidelity.steps] == list(range(2 * STEPS - 1))


def test_guess_mode_and_no_control_are_read(pipe: InnerControlPipeline) -> None:
    assert len(call(pipe, guess_mode=True).fidelity.steps) == STEPS
    assert len(call(pipe, controlnet_conditioning_scale=0.0).fidelity.steps) == STEPS


def test_reading_changes_no_picture(pipe: InnerControlPipeline) -> None:
    assert torch.equal(call(pipe).images, call(pipe, check_fidelity=False).images)


def test_without_the_check_nothing_is_computed(pipe: InnerControlPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("computed although check_fidelity=False")

    monkeypatch.setattr(type(pipe.condition), "score", forbidden)
    run = OnnxRuntimeEngine.__call__
    wanted: list[Any] = []

    def spy(engine: OnnxRuntimeEngine, inputs: dict[str, Tensor], outputs: Any = None) -> dict[str, Tensor]:
        wanted.append((engine.name, outputs))
        return run(engine, inputs, outputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "__call__", spy)

    assert call(pipe, check_fidelity=False).fidelity is None
    assert "probe" not in dict(wanted)
    assert [outputs for name, outputs in wanted if name == "unet"] == [["noise_pred"]] * STEPS
    with pytest.raises(AssertionError, match="computed although"):
        call(pipe)


def test_latents_are_read_but_not_scored(pipe: InnerControlPipeline) -> None:
    found = call(pipe, output_type="latent")

    assert found.images.shape == (1, 4, 8, 8)
    assert found.fidelity.scores is None
    assert found.fidelity.steps == call(pipe).fidelity.steps


def test_the_observer_goes_even_after_an_exception(pipe: InnerControlPipeline) -> None:
    def fails(*_args: Any) -> None:
        assert pipe.unet.observer is not None
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        call(pipe, callback_on_step_end=fails)

    assert pipe.unet.observer is None
    call(pipe)
    assert pipe.unet.observer is None


def test_missing_extractor_weights_show_before_the_work(
    pipe: InnerControlPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_args: Any) -> None:
        raise ConditionError("The HED weights are not installed.")

    monkeypatch.setattr(type(pipe.condition), "_extract", missing)
    monkeypatch.setattr(pipe, "_can_score", False)
    monkeypatch.setattr(pipe.unet, "forward", lambda *_a, **_k: pytest.fail("sampled before the weights were found"))

    with pytest.raises(ConditionError, match="not installed"):
        call(pipe)


def test_a_nan_fails_the_verdict(pipe: InnerControlPipeline) -> None:
    def spoil(_pipe: Any, step: int, _time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * (float("nan") if step == 1 else 1)}

    report = call(pipe, callback_on_step_end=spoil, output_type="latent").fidelity

    assert not report
    assert report.to_json()["passed"] is False


def test_report_as_json(pipe: InnerControlPipeline) -> None:
    report = call(pipe).fidelity

    found = json.loads(json.dumps(report.to_json()))
    assert found["scores"] == report.scores
    assert [step["errors"] for step in found["steps"]] == [step.errors for step in report.steps]
    assert found["passed"] is True


def test_a_bundle_without_a_probe(dynamic_bundle: Path) -> None:
    pipe = InnerControlPipeline.from_pretrained(dynamic_bundle)
    pipe.set_progress_bar_config(disable=True)

    found = call(pipe, image=torch.ones(1, 3, 24, 32))

    assert found.images.shape == (1, 3, 24, 32)
    assert found.fidelity.steps == []
    assert found.fidelity.heat_map is None
    assert len(found.fidelity.scores) == 1
