"""The contract: same seed, same scheduler, fp32: the same picture as diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

from icexport import InnerControlPipeline
from icexport.models.source import ModelSource

CONTROL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).round()
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
}


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> StableDiffusionControlNetPipeline:
    controlnet = ControlNetModel.from_pretrained(tiny_model / "controlnet-canny")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(tiny_model, controlnet=controlnet, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(bundle: Path, backend: str) -> InnerControlPipeline:
    pipe = InnerControlPipeline.from_pretrained(bundle, backend=backend)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> InnerControlPipeline:
    return load(tiny_bundle, "onnxruntime")


@pytest.fixture(scope="module")
def plain(ours: InnerControlPipeline) -> Tensor:
    return call(ours)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(pipe: Any, **options: Any) -> Any:
    defaults = {
        "prompt": "ab",
        "image": CONTROL,
        "num_inference_steps": 3,
        "generator": seeded(),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**(defaults | {k: v() if callable(v) and k == "generator" else v for k, v in options.items()}))[0]


def assert_same(ours: Any, theirs: Any, loop: str = "auto", **options: Any) -> Tensor:
    found, expected = call(ours, loop=loop, **options), call(theirs, **options)
    assert found.shape == expected.shape
    assert distance(found, expected) < 1e-4
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value where that is above 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def test_signature() -> None:
    theirs = list(inspect.signature(StableDiffusionControlNetPipeline.__call__).parameters.values())
    ours = list(inspect.signature(InnerControlPipeline.__call__).parameters.values())
    positional = [p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert len(positional) == 28
    assert [(p.name, p.default, p.kind) for p in ours[:28]] == [(p.name, p.default, p.kind) for p in positional]
    assert {p.kind for p in ours[28:]} == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


LOOPS = pytest.mark.parametrize("loop", ["fast", "diffusers"])


@LOOPS
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(
    ours: InnerControlPipeline,
    theirs: StableDiffusionControlNetPipeline,
    name: str,
    loop: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pipe in (ours, theirs):
        scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, clip_sample=False, **SCHEDULERS[name])
        monkeypatch.setattr(pipe, "scheduler", scheduler)

    assert_same(ours, theirs, loop, eta=0.5 if name == "DDIMScheduler" else 0.0)


EMBEDS = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(8))
OPTIONS: dict[str, dict[str, Any]] = {
    "guidance off": {"guidance_scale": 1.0},
    "strong guidance": {"guidance_scale": 12.0},
    "guess mode": {"guess_mode": True},
    "guess mode without guidance": {"guess_mode": True, "guidance_scale": 0.0},
    "window": {"control_guidance_start": 0.3, "control_guidance_end": 0.7},
    "window as lists": {"control_guidance_start": [0.0], "control_guidance_end": [0.5]},
    "negative prompt": {"negative_prompt": "xyz"},
    "two pictures": {"num_images_per_prompt": 2},
    "a generator for each": {"num_images_per_prompt": 2, "generator": lambda: [seeded(1), seeded(2)]},
    "two prompts": {"prompt": ["ab", "c"], "negative_prompt": ["d", "ef"]},
    "two prompts and control maps": {"prompt": ["ab", "c"], "image": torch.cat([CONTROL, 1 - CONTROL])},
    "prompts times pictures": {"prompt": ["ab", "c"], "num_images_per_prompt": 2},
    "prompt embeds": {"prompt": None, "prompt_embeds": EMBEDS[:1], "negative_prompt_embeds": EMBEDS[1:]},
    "two prompt embeds": {"prompt": None, "prompt_embeds": EMBEDS, "guidance_scale": 1.0},
    "latents": {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))},
    "no control": {"controlnet_conditioning_scale": 0.0},
    "weak control": {"controlnet_conditioning_scale": 0.3},
    "long prompt": {"prompt": "abc def ghi jkl mno pqr"},
    "pil": {"image": Image.fromarray(np.uint8(255 * CONTROL[0].permute(1, 2, 0)))},
    "resized pil": {"image": Image.new("RGB", (40, 40), "white"), "height": 16, "width": 16},
    "array": {"image": CONTROL.permute(0, 2, 3, 1).numpy()},
    "list of tensors": {"prompt": ["a", "b"], "image": [CONTROL[0], CONTROL[0]]},
}


OTHER_FORMS = ("pil", "array")  # of the same control map: the only options that change nothing


@LOOPS
@pytest.mark.parametrize("name", OPTIONS)
def test_options(
    ours: InnerControlPipeline, theirs: StableDiffusionControlNetPipeline, plain: Tensor, name: str, loop: str
) -> None:
    found = assert_same(ours, theirs, loop, **OPTIONS[name])

    changed = found.shape != plain.shape or distance(found, plain) > 1e-3
    assert changed == (name not in OTHER_FORMS), "else the comparison would prove nothing"


def test_torch_backend(tiny_bundle: Path, theirs: StableDiffusionControlNetPipeline) -> None:
    assert_same(load(tiny_bundle, "torch"), theirs, num_images_per_prompt=2, guess_mode=True, negative_prompt="xyz")


def test_an_integer_scale_is_taken(ours: InnerControlPipeline, plain: Tensor) -> None:
    assert torch.equal(call(ours, controlnet_conditioning_scale=1), plain)
    assert torch.equal(call(ours, controlnet_conditioning_scale=0), call(ours, controlnet_conditioning_scale=0.0))


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip(ours: InnerControlPipeline, tiny_model: Path, skip: int) -> None:
    """Against the definition: diffusers fails here with transformers 5, whose CLIPTextModel has no .text_model."""
    encoder = ModelSource.find("canny", str(tiny_model)).text_encoder(torch.float32)
    embeds = []
    for text, layers in (("ab", skip), ("", 0)):  # diffusers skips for the prompt only
        ids = ours.tokenizer(text, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            state = encoder(ids, output_hidden_states=True).hidden_states[-1 - layers]
            embeds.append(getattr(encoder, "text_model", encoder).final_layer_norm(state))

    expected = call(ours, prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])

    assert distance(call(ours, clip_skip=skip), expected) < 1e-4


@pytest.mark.parametrize("kind", ["np", "pt", "pil"])
@pytest.mark.parametrize("check", [True, False])
def test_pictures(
    ours: InnerControlPipeline, theirs: StableDiffusionControlNetPipeline, kind: str, check: bool
) -> None:
    options = {"output_type": kind, "num_images_per_prompt": 2}
    found, expected = call(ours, **options, check_fidelity=check), call(theirs, **options)

    assert type(found) is type(expected)
    if kind == "pil":
        assert [f.size for f in found] == [e.size for e in expected]
        found, expected = (np.stack([np.asarray(f) for f in pictures]) / 255 for pictures in (found, expected))
    assert found.shape == expected.shape
    error = float(((found - expected) ** 2).mean())
    assert 10 * np.log10(1 / max(error, 1e-20)) >= 50


def test_plain_tuple(ours: InnerControlPipeline) -> None:
    found = ours("ab", CONTROL, num_inference_steps=1, return_dict=False)

    assert type(found) is tuple
    assert len(found) == 2
    assert found[1] is None
    assert found[0][0].size == (16, 16)


def test_output_object(ours: InnerControlPipeline) -> None:
    found = ours("ab", CONTROL, num_inference_steps=1)

    assert found.images[0].size == (16, 16)
    assert found.nsfw_content_detected is None
    assert found[0] is found.images
    assert found.fidelity.condition == "canny"


def recording(into: list[tuple[int, float, list[str]]]) -> Callable[..., dict[str, Tensor]]:
    def callback(_pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        into.append((step, float(time), sorted(tensors)))
        tensors["latents"] = 0.9 * tensors["latents"]
        return tensors

    return callback


def test_callback_sees_and_changes_tensors(
    ours: InnerControlPipeline, theirs: StableDiffusionControlNetPipeline, plain: Tensor
) -> None:
    seen: list[list[tuple[int, float, list[str]]]] = [[], []]
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    found, expected = (
        call(pipe, callback_on_step_end=recording(into), callback_on_step_end_tensor_inputs=names)
        for pipe, into in zip((ours, theirs), seen, strict=True)
    )

    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
    assert distance(found, expected) < 1e-4
    assert distance(found, plain) > 1e-3


def test_a_callback_may_end_guidance(ours: InnerControlPipeline, theirs: StableDiffusionControlNetPipeline) -> None:
    def end_guidance(pipe: Any, step: int, _time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors = {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        return tensors

    names = ["prompt_embeds"]
    if "image" in theirs._callback_tensor_inputs:
        names.append("image")
    else:
        pytest.skip("this diffusers cannot end guidance under a ControlNet")
    assert_same(ours, theirs, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names)


def test_own_timesteps(ours: InnerControlPipeline, theirs: StableDiffusionControlNetPipeline, monkeypatch) -> None:
    for pipe in (ours, theirs):
        scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        monkeypatch.setattr(pipe, "scheduler", scheduler)

    for loop in ("fast", "diffusers"):
        assert_same(ours, theirs, loop, timesteps=[900, 400, 10])
        assert_same(ours, theirs, loop, sigmas=[10.0, 2.5, 0.1])


def test_diffusers_attributes(ours: InnerControlPipeline, theirs: StableDiffusionControlNetPipeline) -> None:
    assert ours.device == torch.device("cpu")
    assert ours.vae_scale_factor == theirs.vae_scale_factor
    for part in ("unet", "controlnet", "vae"):
        expected = {k: v for k, v in getattr(theirs, part).config.items() if not k.startswith("_")}
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in getattr(ours, part).config.items()}
        assert found == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}
        assert getattr(ours, part).dtype == torch.float32
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert ours.tokenizer("ab").input_ids == theirs.tokenizer("ab").input_ids
