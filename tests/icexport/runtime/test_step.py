"""A step as one recorded call: same pictures, fewer launches, and never a silent run without a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icexport import InnerControlPipeline
from icexport.backends.probe_kernels import load_probe_kernels
from icexport.bundle.store import Bundle
from icexport.errors import UnsupportedOptionError
from icexport.runtime.schedulers import scheduler_class
from icexport.runtime.step import StepGraphs
from tests.recorder import TapeRecorder


def draw(pipe: InnerControlPipeline, **options: Any) -> tuple[Tensor, list[list[float]]]:
    control = torch.zeros(1, 3, 16, 16)
    control[..., 4:12, 8] = 1
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    options = {"prompt": "an apple", "num_inference_steps": 4, **options}
    found = pipe(image=control, generator=generator, output_type="pt", **options)
    return found.images, [step.errors for step in found.fidelity.steps]


@pytest.fixture
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    pipe = InnerControlPipeline.from_pretrained(tiny_bundle, backend="torch")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def launch(pipe: InnerControlPipeline, recorder: TapeRecorder) -> None:
    """Launch steps as ``cuda_graph=True`` does, in both loops."""
    graphs = StepGraphs(pipe.controlnet.engine, pipe.unet.engine, recorder)
    pipe.unet.step_graphs = pipe.controlnet.step_graphs = graphs
    assert pipe._loaded.step_engine is not None
    pipe._loaded.step_engine._models._step_graphs = graphs


LOOPS = pytest.mark.parametrize("loop", ["fast", "diffusers"])


@LOOPS
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("UniPCMultistep", {}),
        ("UniPCMultistep", {"guidance_scale": 1.0}),
        ("UniPCMultistep", {"guess_mode": True}),
        ("UniPCMultistep", {"guess_mode": True, "guidance_scale": 1.0}),
        ("UniPCMultistep", {"control_guidance_end": 0.5}),
        ("PNDM", {"controlnet_conditioning_scale": 0.4}),  # it keeps predictions of earlier steps
    ],
    ids=str,
)
def test_the_same_picture(pipe: InnerControlPipeline, scheduler: str, options: dict[str, Any], loop: str) -> None:
    options = {**options, "loop": loop}
    pipe.scheduler = scheduler_class(scheduler).from_config(pipe.scheduler.config)
    expected, errors = draw(pipe, **options)
    recorder = TapeRecorder()
    launch(pipe, recorder)
    for _ in range(2):
        images, readings = draw(pipe, **options)
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
        assert readings == errors
    assert 1 <= len(recorder.recorded) <= 2  # with the control, and without where it ends early
    assert recorder.replays >= 8


@LOOPS
def test_no_setting_of_one_picture_is_frozen_for_the_next(pipe: InnerControlPipeline, loop: str) -> None:
    """Everything here has the same shapes, and so the same recordings."""
    settings: list[dict[str, Any]] = [
        {},
        {"controlnet_conditioning_scale": 0.2},
        {"guidance_scale": 3.0},
        {"control_guidance_end": 0.5},
        {"control_guidance_start": 0.5},
        {"prompt": "a pear"},
        {"seed": 1},
        {"num_inference_steps": 3},
    ]
    settings = [{**options, "loop": loop} for options in settings]
    expected = [draw(pipe, **options) for options in settings]
    recorder = TapeRecorder()
    launch(pipe, recorder)
    for options, (images, errors) in [*zip(settings, expected, strict=True)] * 2:
        found, readings = draw(pipe, **options)
        torch.testing.assert_close(found, images, rtol=0, atol=0)
        assert readings == errors, options
    pictures = {images.numpy().tobytes() for images, _ in expected}
    assert len(pictures) == len(settings), "every setting changes the picture"
    assert 1 <= len(recorder.recorded) <= 4, "with guidance, and with the control or without it"


@LOOPS
def test_the_controlnet_waits_for_the_unet(pipe: InnerControlPipeline, loop: str) -> None:
    calls: list[str] = []

    def watch(name: str, engine: Any) -> None:
        run = engine._module.forward
        engine._module.forward = lambda *args: (calls.append(name), run(*args))[1]

    watch("controlnet", pipe.controlnet.engine)
    watch("unet", pipe.unet.engine)
    launch(pipe, recorder := TapeRecorder())
    draw(pipe, check_fidelity=[], loop=loop)
    assert len(recorder.recorded) == 1
    assert recorder.replays == 4
    assert calls == ["controlnet", "unet"]


def test_no_graph_on_a_cpu(tiny_bundle: Path) -> None:
    for backend in ("onnxruntime", "torch"):
        with pytest.raises(UnsupportedOptionError, match=rf"{backend} on cpu cannot be captured"):
            InnerControlPipeline.from_pretrained(tiny_bundle, backend=backend, cuda_graph=True)


def test_no_probe_kernels_on_a_cpu(tiny_bundle: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="run on a CUDA device, not on cpu"):
        InnerControlPipeline.from_pretrained(tiny_bundle, probe_kernels=True)


def test_an_old_bundle_has_no_weights_for_the_kernels(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    bundle.manifest.files = {name: h for name, h in bundle.manifest.files.items() if not name.startswith("probe/")}
    with pytest.raises(UnsupportedOptionError, match="without the probe's weights"):
        load_probe_kernels(bundle, "cuda")
