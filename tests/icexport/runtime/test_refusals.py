from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from icexport import InnerControlPipeline
from icexport.errors import BundleError, UnsupportedOptionError, UsageError
from icexport.runtime.schedulers import CHOICES, choose_scheduler, scheduler_class

CONTROL = torch.ones(1, 3, 16, 16)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    pipe = InnerControlPipeline.from_pretrained(tiny_bundle)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ip_adapter_image": CONTROL}, "ip_adapter_image is not supported: IP-Adapters add"),
        ({"ip_adapter_image_embeds": [CONTROL]}, "ip_adapter_image_embeds is not supported"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs is not supported: .*merge LoRA"),
        ({"clip_skip": 3}, "clip_skip must be 0 to 2"),
    ],
)
def test_options_that_graphs_cannot_express(pipe: InnerControlPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        pipe("a", CONTROL, num_inference_steps=1, **options)


def test_loras_and_adapters(pipe: InnerControlPipeline) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"Fuse the LoRA .*fuse_lora.*then build"):
        pipe.load_lora_weights("some/lora")
    with pytest.raises(UnsupportedOptionError, match="load_ip_adapter is not supported: IP-Adapters add"):
        pipe.load_ip_adapter("some/adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": torch.ones(1, 3, 32, 16)}, r"height 32: the bundle .* takes 16\. .*--height MIN:OPT:MAX.*resize"),
        ({"image": torch.ones(1, 3, 16, 20)}, r"width 20: the bundle .* takes 16\."),
        ({"image": Image.new("RGB", (64, 64))}, "height 64"),
        ({"num_images_per_prompt": 5}, r"5 pictures in one call: .* takes 1:1:4\. .*--batch-size .*contains 5\."),
        ({"prompt": ["a", "b", "c"], "num_images_per_prompt": 2}, "6 pictures"),
        ({"image": np.zeros((1, 16, 16, 3), np.float32), "height": 18}, "height=18: .*multiples of 4"),
        ({"image": None}, r"image is missing: .*icexport\.conditions"),
        ({"prompt": None}, "prompt is missing"),
    ],
)
def test_what_the_profile_does_not_allow(pipe: InnerControlPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(**({"prompt": "a", "image": CONTROL, "num_inference_steps": 1} | options))


def test_sizes_inside_a_profile_must_still_halve(dynamic_bundle: Path) -> None:
    pipe = InnerControlPipeline.from_pretrained(dynamic_bundle)

    with pytest.raises(UsageError, match="width 22: this model needs multiples of 4"):
        pipe("a", torch.ones(1, 3, 16, 22), num_inference_steps=1)
    with pytest.raises(UsageError, match="height 36: .*takes 16:16:32"):
        pipe("a", torch.ones(1, 3, 36, 16), num_inference_steps=1)


def test_arguments_that_do_not_exist(pipe: InnerControlPipeline) -> None:
    with pytest.raises(TypeError, match="unknown arguments: best, worst"):
        pipe("a", CONTROL, worst=1, best=2)


def test_errors_of_diffusers_stay(pipe: InnerControlPipeline) -> None:
    with pytest.raises(ValueError, match="Cannot forward both `prompt`"):
        pipe("a", CONTROL, prompt_embeds=torch.zeros(1, 12, 16))
    with pytest.raises(ValueError, match="larger or equal to control guidance end"):
        pipe("a", CONTROL, control_guidance_start=0.5, control_guidance_end=0.5)
    with pytest.raises(
        UsageError, match=r"prompt_embeds has shape \(1, 9, 16\): .* \[B,S,16\], S = 12 .*--text-length 12:12:36"
    ):
        pipe(None, CONTROL, prompt_embeds=torch.zeros(1, 9, 16), negative_prompt_embeds=torch.zeros(1, 9, 16))


def test_to(pipe: InnerControlPipeline) -> None:
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.device("cpu"), torch.float32) is pipe
    assert pipe.to(dtype=torch.float32) is pipe
    with pytest.raises(UnsupportedOptionError, match=r"compute in torch\.float32, .*--dtype fp16"):
        pipe.to(torch.float16)
    with pytest.raises(UnsupportedOptionError, match=r"For torch\.bfloat16"):
        pipe.to("cpu", torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(pipe: InnerControlPipeline, tiny_bundle: Path) -> None:
    from engines.errors import BackendUnavailableError

    with pytest.raises(BackendUnavailableError, match="cannot use device 'cuda' here"):
        pipe.to("cuda")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        InnerControlPipeline.from_pretrained(tiny_bundle, device="cuda:0")


def test_backends_that_were_not_built(dynamic_bundle: Path) -> None:
    with pytest.raises(BundleError, match="was built for onnxruntime, not for torch.*--backend torch"):
        InnerControlPipeline.from_pretrained(dynamic_bundle, backend="torch")
    with pytest.raises(BundleError, match="not for tensorrt"):
        InnerControlPipeline.from_pretrained(dynamic_bundle, backend="tensorrt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_control_maps_are_judged_in_float32(pipe: InnerControlPipeline, dtype: torch.dtype) -> None:
    maps = pipe._prepare(CONTROL.to(dtype), "a", None, (None, None), 1)
    assert {each.dtype for each in maps} == {torch.float32}


def test_every_choice_is_a_scheduler_of_diffusers() -> None:
    own = UniPCMultistepScheduler()
    found = {name: choose_scheduler(name, own) for name in CHOICES}
    assert {name: type(scheduler).__name__ for name, scheduler in found.items()} == {
        "unipc": "UniPCMultistepScheduler",
        "euler-a": "EulerAncestralDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "dpm++-karras": "DPMSolverMultistepScheduler",
    }
    assert [found[name].config["use_karras_sigmas"] for name in ("dpm++", "dpm++-karras")] == [False, True]


def test_scheduler_names() -> None:
    from diffusers import EulerDiscreteScheduler

    assert scheduler_class("EulerDiscrete") is EulerDiscreteScheduler
    assert scheduler_class("EulerDiscreteScheduler") is EulerDiscreteScheduler
    for name in ("Euler", "SchedulerMixin", "torch", ""):
        with pytest.raises(UsageError, match=r"no scheduler .*Known: .*DDIMScheduler"):
            scheduler_class(name)
