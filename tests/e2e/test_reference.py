"""The embedded reference model, from build to pictures that follow their control maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import icexport
from icexport.fidelity.metrics import psnr
from icexport.runtime.schedulers import scheduler_class
from tests.e2e.drawings import PROMPTS, generators


@pytest.fixture(scope="session")
def reference_pipe() -> StableDiffusionControlNetPipeline:
    folder = icexport.reference_path()
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet-canny")
    found = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=controlnet, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


def test_the_model_is_small_enough_and_free_of_pickles() -> None:
    files = [p for p in icexport.reference_path().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 60e6
    assert not [p.name for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("UniPCMultistep", {}),
        ("DDIM", {}),
        ("EulerDiscrete", {}),
        ("DPMSolverMultistep", {}),
        ("EulerAncestralDiscrete", {}),
        ("HeunDiscrete", {}),
        ("UniPCMultistep", {"guidance_scale": 1.0}),
        ("UniPCMultistep", {"guess_mode": True}),
        ("UniPCMultistep", {"guess_mode": True, "guidance_scale": 1.0}),
        ("UniPCMultistep", {"control_guidance_start": 0.2, "control_guidance_end": 0.7}),
        ("UniPCMultistep", {"controlnet_conditioning_scale": 0.6, "negative_prompt": "black"}),
    ],
    ids=str,
)
def test_same_picture_as_diffusers(
    pipe: Any, reference_pipe: Any, control_maps: torch.Tensor, scheduler: str, options: dict[str, Any]
) -> None:
    pictures = []
    for each in (pipe, reference_pipe):
        each.scheduler = scheduler_class(scheduler).from_config(each.scheduler.config)
        call = {"image": control_maps[:1], "num_inference_steps": 8, "output_type": "pt", **options}
        pictures.append(each(PROMPTS[0], generator=torch.Generator().manual_seed(5), **call).images)
    assert float(psnr(*pictures).min()) >= 50


def test_pictures_follow_the_control_and_the_report_knows(pipe: Any, control_maps: torch.Tensor) -> None:
    pipe.scheduler = scheduler_class("UniPCMultistep").from_config(pipe.scheduler.config)
    call = {"image": control_maps, "num_inference_steps": 20, "guidance_scale": 3.0}
    controlled = pipe(list(PROMPTS), generator=generators(), **call)
    free = pipe(list(PROMPTS), generator=generators(), controlnet_conditioning_scale=0.0, **call)
    scores, without = torch.tensor(controlled.fidelity.scores), torch.tensor(free.fidelity.scores)
    assert scores.mean() >= 0.85
    assert scores.mean() >= without.mean() + 0.3
    readings = [sum(report.fidelity.steps[-1].errors) for report in (controlled, free)]
    assert readings[0] < readings[1]
    assert bool(controlled.fidelity)


def test_pictures_have_the_colour_of_the_prompt(pipe: Any, control_maps: torch.Tensor) -> None:
    call = {"image": control_maps[2:3], "num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
    inside = {}
    for color in ("red", "green", "blue"):
        picture = pipe(f"a {color} book", generator=torch.Generator().manual_seed(1), **call).images[0]
        inside[color] = picture[:, 30:54, 20:44].mean((1, 2))
    assert [int(inside[color].argmax()) for color in ("red", "green", "blue")] == [0, 1, 2]
