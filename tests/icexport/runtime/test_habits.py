"""What a user of diffusers tries: each public name works, or is refused by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from icexport.errors import UnsupportedOptionError
from icexport.runtime.pipeline import InnerControlPipeline
from icexport.runtime.refused import REFUSED

CONTROL = torch.zeros(1, 3, 16, 16)
WORKS = {
    # the call, and what it is made of
    *(
        "check_image",
        "check_inputs",
        "decode_latents",
        "encode_prompt",
        "get_guidance_scale_embedding",
        "numpy_to_pil",
    ),
    *("prepare_extra_step_kwargs", "prepare_image", "prepare_latents", "progress_bar", "run_safety_checker"),
    *("maybe_convert_prompt", "maybe_free_model_hooks", "remove_all_hooks", "set_progress_bar_config"),
    # what it tells
    *("clip_skip", "components", "config", "cross_attention_kwargs", "device", "do_classifier_free_guidance", "dtype"),
    *("guidance_scale", "interrupt", "name_or_path", "num_timesteps", "parameters"),
    # ours
    *("from_pretrained", "from_pipe", "to"),
    # of the config, not of the weights
    *("extract_init_dict", "get_config_dict", "load_config", "register_modules", "register_to_config", "save_config"),
    *("register_for_auto_class", "to_json_file", "to_json_string"),
    # nothing was switched on that they could switch off
    *("disable_attention_slicing", "disable_xformers_memory_efficient_attention"),
    # of LoRA files, not of the pipeline
    *("fused_loras", "lora_scale", "lora_state_dict", "num_fused_loras", "pack_weights", "write_lora_layers"),
    # constants
    *("config_name", "has_compatibles", "hf_device_map", "ignore_for_config", "model_cpu_offload_seq"),
    *("text_encoder_name", "unet_name"),
}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    found = InnerControlPipeline.from_pretrained(tiny_bundle, backend="torch")
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: Any, **options: Any) -> Any:
    given = {"image": CONTROL, "num_inference_steps": 1, "output_type": "pt", **options}
    return pipe("a", generator=[torch.Generator().manual_seed(i) for i in range(2)], num_images_per_prompt=2, **given)


def test_every_public_name_is_decided() -> None:
    """Fails when a release of diffusers brings another one: add it to ``WORKS`` or to ``REFUSED``."""
    names = {name for name in dir(StableDiffusionControlNetPipeline) if not name.startswith("_")}
    assert names == WORKS | (REFUSED.keys() & names)
    assert not WORKS & REFUSED.keys()
    assert set(REFUSED) <= names, "what is gone from diffusers need not be refused"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(pipe: InnerControlPipeline, name: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"^{name} is not supported: .*[a-z].*\\.$"):
        getattr(pipe, name)("anything", weights=1)
    assert inspect.getdoc(getattr(InnerControlPipeline, name))


@pytest.mark.parametrize(
    "name",
    [name for name in sorted(WORKS) if isinstance(getattr(StableDiffusionControlNetPipeline, name, 0), property)],
)
def test_what_it_tells_can_be_asked(pipe: InnerControlPipeline, name: str) -> None:
    draw(pipe)
    getattr(pipe, name)


def test_what_switches_off_does_nothing(pipe: InnerControlPipeline) -> None:
    expected = draw(pipe).images
    for name in ("disable_attention_slicing", "disable_xformers_memory_efficient_attention", "remove_all_hooks"):
        getattr(pipe, name)()
    assert torch.equal(draw(pipe).images, expected)


def test_decoding_one_by_one(pipe: InnerControlPipeline) -> None:
    expected, sizes = draw(pipe).images, []
    engine = pipe.vae.engine

    class Counted:
        device, outputs = engine.device, engine.outputs

        def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            sizes.append(len(inputs["latents"]))
            return engine(inputs)

    pipe.vae.enable_slicing()
    pipe.vae.engine = Counted()
    try:
        found = draw(pipe).images
    finally:
        pipe.vae.engine = engine
        pipe.vae.disable_slicing()
    assert sizes == [1, 1]
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(UnsupportedOptionError, match="enable_tiling is not supported.*enable_slicing"):
        pipe.vae.enable_tiling()


def test_compiling_a_stand_in_changes_nothing(pipe: InnerControlPipeline) -> None:
    expected = draw(pipe).images
    own = pipe.fork()
    compiled = torch.compile(own.unet, backend="eager")
    own.unet = compiled
    with pytest.raises(UnsupportedOptionError, match="models of another kind"):
        draw(own)
    assert torch.equal(draw(pipe).images, expected)


def test_models_of_diffusers_are_refused(tiny_model: Path, pipe: InnerControlPipeline) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model)
    with pytest.raises(UnsupportedOptionError, match=r"models of another kind.*from_pretrained\(BUNDLE\)"):
        InnerControlPipeline.from_pipe(theirs, controlnet=pipe.controlnet)
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(UnsupportedOptionError, match="takes the residuals of its ControlNet"):
        plain("a", num_inference_steps=1)


def test_another_vae_of_diffusers_decodes(tiny_model: Path, pipe: InnerControlPipeline) -> None:
    """A component in PyTorch in place of an engine works as far as diffusers' loop lets it."""
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    own = InnerControlPipeline.from_pipe(pipe, vae=vae)
    own.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(own).images, draw(pipe).images, atol=1e-5)
