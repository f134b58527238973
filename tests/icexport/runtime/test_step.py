"""A step as one recorded call: same pictures, fewer launches, and never a silent run without a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icexport import InnerControlPipeline
from icexport.backends.probe_kernels import load_probe_kernels
from icexport.bundle.store import Bundle
from icexport.errors import UnsupportedOptionError
from icexport.runtime.step import StepGraphs


class CpuRecorder:
    """Replays by calling again, and writes into the outputs of the recording, as a CUDA graph does."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(
        self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], inputs: dict[str, Tensor]
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        self.recordings += 1
        outputs = {name: tensor.clone() for name, tensor in function(inputs).items()}

        def replay() -> None:
            self.replays += 1
            for name, tensor in function(inputs).items():
                outputs[name].copy_(tensor)

        return replay, outputs


def draw(pipe: InnerControlPipeline, **options: Any) -> tuple[Tensor, list[list[float]]]:
    control = torch.zeros(1, 3, 16, 16)
    control[..., 4:12, 8] = 1
    found = pipe(
        "an apple",
        image=control,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    )
    return found.images, [step.errors for step in found.fidelity.steps]


@pytest.fixture
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    pipe = InnerControlPipeline.from_pretrained(tiny_bundle, backend="torch")
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
def test_the_same_picture(pipe: InnerControlPipeline, scheduler: str, options: dict[str, Any]) -> None:
    from icexport.runtime.schedulers import scheduler_class

    pipe.scheduler = scheduler_class(scheduler).from_config(pipe.scheduler.config)
    expected, errors = draw(pipe, **options)
    recorder = CpuRecorder()
    graphs = StepGraphs(pipe.controlnet.engine, pipe.unet.engine, recorder)
    pipe.unet.step_graphs = pipe.controlnet.step_graphs = graphs
    for _ in range(2):
        images, readings = draw(pipe, **options)
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
        assert readings == errors
    assert 1 <= recorder.recordings <= 2  # with the control, and without where it ends early
    assert recorder.replays >= 8


def test_the_controlnet_waits_for_the_unet(pipe: InnerControlPipeline) -> None:
    calls: list[str] = []

    def watch(name: str, engine: Any) -> Any:
        run = engine._module.forward
        engine._module.forward = lambda *args: (calls.append(name), run(*args))[1]
        return engine

    graphs = StepGraphs(
        watch("controlnet", pipe.controlnet.engine), watch("unet", pipe.unet.engine), recorder := CpuRecorder()
    )
    pipe.unet.step_graphs = pipe.controlnet.step_graphs = graphs
    draw(pipe, check_fidelity=[])
    assert recorder.recordings == 1
    assert calls == ["controlnet", "unet"] * (1 + recorder.replays)


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
