"""What a file or folder of weights is: told from the names and shapes of its tensors, or from its config.

What icexport cannot take is named for what it is, with the way out. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of a file by name."""

LATENT_CHANNELS = 4
"""Channels that the UNet of a model takes that is given nothing but noisy latents."""

CHECKPOINT, UNET, VAE, TEXT_ENCODER, CONTROLNET = "checkpoint", "unet", "vae", "text_encoder", "controlnet"


@dataclass(frozen=True)
class Kind:
    """One kind of weights.

    Attributes:
        title: what people call it, with its article.
        part: what it can be used as: ``checkpoint`` for a whole base model, or a component's name; empty: nothing.
        way_out: what to do with it, a sentence; empty where it can be used.
    """

    title: str
    part: str = ""
    way_out: str = ""


ALIGN = Kind("an InnerControl align model", "align")
"""What the authors of InnerControl save their probes as."""

_OTHER_BASE = "icexport builds Stable Diffusion 1 and 2."
_FUSE = (
    "Load it into the model with diffusers (pipe.load_lora_weights(FILE), pipe.fuse_lora(), pipe.save_pretrained("
    "FOLDER)), and build from that folder."
)
_ADAPTER = "It has no place in the exported graphs; use a ControlNet for this condition."

_LDM_UNET, _LDM_VAE, _LDM_TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
LDM_PREFIXES = {UNET: _LDM_UNET, VAE: _LDM_VAE, TEXT_ENCODER: _LDM_TEXT}
"""What the names of each component's tensors begin with in a single file of Stable Diffusion."""

_LORA = re.compile(r"lora[_.]|\.hada_w|\.lokr_|\.dora_scale")


def _has(*parts: str) -> Callable[[Shapes], bool]:
    """Return a test for names that contain one of ``parts``."""
    return lambda shapes: any(part in name for name in shapes for part in parts)


def _starts(*prefixes: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(prefixes) for name in shapes)


def _input_channels(shapes: Shapes) -> int | None:
    """Return the number of channels that a UNet takes; None: it is none."""
    for name in (f"{_LDM_UNET}input_blocks.0.0.weight", "conv_in.weight"):
        if name in shapes and len(shapes[name]) > 1:
            return shapes[name][1]
    return None


def _is_unet(shapes: Shapes) -> bool:
    return "conv_in.weight" in shapes and _starts("time_embedding.")(shapes) and _starts("up_blocks.")(shapes)


_INPUTS = {
    5: Kind("a depth-to-image model (5 input channels)", way_out=f"{_OTHER_BASE} Use its depth ControlNet instead."),
    7: Kind("an upscaler (7 input channels)", way_out=_OTHER_BASE),
    8: Kind("an instruct-pix2pix model (8 input channels)", way_out=f"{_OTHER_BASE} Use its text-to-image version."),
    9: Kind("an inpainting model (9 input channels)", way_out=f"{_OTHER_BASE} Use its text-to-image version."),
}

_TENSORS: tuple[tuple[Callable[[Shapes], bool], Kind], ...] = (
    (lambda shapes: any(_LORA.search(name) for name in shapes), Kind("a LoRA", way_out=_FUSE)),
    (
        lambda shapes: (
            _starts("string_to_param.")(shapes)
            or (0 < len(shapes) <= 2 and all(len(s) in (1, 2) and "." not in n for n, s in shapes.items()))
        ),
        Kind(
            "a textual inversion",
            way_out="Load it with diffusers (pipe.load_textual_inversion(FILE)), save text encoder and tokenizer with "
            "the model, and build from that folder.",
        ),
    ),
    (
        _has("motion_modules.", "motion_module."),
        Kind("a motion module of AnimateDiff", way_out="icexport draws single pictures."),
    ),
    (
        _starts("image_proj.", "ip_adapter.", "image_proj_model."),
        Kind("an IP-Adapter", way_out="It adds attention layers that the exported UNet does not have."),
    ),
    (_starts("adapter.body.", "body.0.block1.", "body.0.in_conv."), Kind("a T2I-Adapter", way_out=_ADAPTER)),
    (
        _starts("task_embedding", "transformer_layes.", "control_add_embedding."),
        Kind("a ControlNet-Union", way_out="Use the ControlNet of one condition."),
    ),
    (_has("base_to_ctrl", "ctrl_to_base"), Kind("a ControlNet-XS", way_out="Use a plain ControlNet.")),
    (
        lambda shapes: _starts("controlnet_cond_embedding.")(shapes) and _starts("add_embedding.")(shapes),
        Kind("a ControlNet of Stable Diffusion XL", way_out=_OTHER_BASE),
    ),
    (
        _starts("conditioner.embedders.1.", "text_encoders.clip_g.", "conditioner.embedders.0.transformer."),
        Kind("Stable Diffusion XL", way_out=_OTHER_BASE),
    ),
    (_starts("conditioner.embedders.0."), Kind("the refiner of Stable Diffusion XL", way_out=_OTHER_BASE)),
    (_has("joint_blocks."), Kind("Stable Diffusion 3", way_out=_OTHER_BASE)),
    (_has("double_blocks.", "single_transformer_blocks."), Kind("FLUX", way_out=_OTHER_BASE)),
    (_has("adaln_single."), Kind("PixArt, or a model of its kind", way_out=_OTHER_BASE)),
    (_has("aggregation_network", "bottleneck_layers."), ALIGN),
    (
        _starts("control_model.", "controlnet_cond_embedding.", "input_hint_block."),
        Kind("a ControlNet", CONTROLNET),
    ),
    (_starts(_LDM_UNET), Kind("a single-file model of Stable Diffusion", CHECKPOINT)),
    (_is_unet, Kind("a UNet", UNET)),
    (_starts(_LDM_VAE, "decoder.conv_in.", "decoder.mid."), Kind("an autoencoder (VAE)", VAE)),
    (
        _starts("text_model.", _LDM_TEXT, "embeddings.token_embedding."),
        Kind("a text encoder", TEXT_ENCODER),
    ),
)
"""Kinds of files by their tensors; the first that fits counts."""

_CLASSES: tuple[tuple[str, Kind], ...] = (
    ("StableDiffusionXLImg2Img", Kind("the refiner of Stable Diffusion XL", way_out=_OTHER_BASE)),
    ("StableDiffusionXL", Kind("Stable Diffusion XL", way_out=_OTHER_BASE)),
    ("StableDiffusion3", Kind("Stable Diffusion 3", way_out=_OTHER_BASE)),
    ("StableDiffusionUpscale", _INPUTS[7]),
    ("StableDiffusionLatentUpscale", _INPUTS[7]),
    ("StableDiffusionDepth2Img", _INPUTS[5]),
    ("StableDiffusionInstructPix2Pix", _INPUTS[8]),
    ("StableDiffusionAdapter", Kind("a pipeline with a T2I-Adapter", way_out=_ADAPTER)),
    ("Flux", Kind("FLUX", way_out=_OTHER_BASE)),
    ("PixArt", Kind("PixArt", way_out=_OTHER_BASE)),
    ("SD3", Kind("Stable Diffusion 3", way_out=_OTHER_BASE)),
    ("T2IAdapter", Kind("a T2I-Adapter", way_out=_ADAPTER)),
    ("MultiAdapter", Kind("T2I-Adapters", way_out=_ADAPTER)),
    ("ControlNetUnion", Kind("a ControlNet-Union", way_out="Use the ControlNet of one condition.")),
    ("ControlNetXS", Kind("a ControlNet-XS", way_out="Use a plain ControlNet.")),
    ("MotionAdapter", Kind("a motion module of AnimateDiff", way_out="icexport draws single pictures.")),
    ("AnimateDiff", Kind("a model of AnimateDiff", way_out="icexport draws single pictures.")),
    ("UNetMotionModel", Kind("a model of AnimateDiff", way_out="icexport draws single pictures.")),
    ("AutoencoderTiny", Kind("a tiny autoencoder (TAESD)", way_out="icexport takes AutoencoderKL.")),
    ("ControlNetModel", Kind("a ControlNet", CONTROLNET)),
    ("UNet2DConditionModel", Kind("a UNet", UNET)),
    ("AutoencoderKL", Kind("an autoencoder (VAE)", VAE)),
    ("CLIPTextModel", Kind("a text encoder", TEXT_ENCODER)),
    ("InnerControlProbe", Kind("a probe of icexport", "probe")),
)
"""Kinds by what the name of a class begins with; the first that fits counts."""

_CLASS_OF = {
    UNET: "UNet2DConditionModel",
    VAE: "AutoencoderKL",
    TEXT_ENCODER: "CLIPTextModel",
    CONTROLNET: "ControlNetModel",
    "probe": "InnerControlProbe",
}
"""Class that each component has to have."""


def kind_of_tensors(shapes: Shapes) -> Kind | None:
    """Return what a file is; None: nothing that is known."""
    found = next((kind for test, kind in _TENSORS if test(shapes)), None)
    if found is not None and found.part in (CHECKPOINT, UNET):
        return _INPUTS.get(_input_channels(shapes) or LATENT_CHANNELS, found)
    return found


def kind_of_class(name: str) -> Kind | None:
    """Return what a model or pipeline of a class of diffusers is; None: nothing that is known."""
    return next((kind for prefix, kind in _CLASSES if name.startswith(prefix)), None)


def kind_of_config(config: Mapping[str, Any]) -> Kind | None:
    """Return what a component with this ``config.json`` is; None: it does not say, or nothing that is known."""
    found = kind_of_class(class_of(config))
    if found is not None and found.part == UNET:
        return _INPUTS.get(config.get("in_channels", LATENT_CHANNELS), found)
    return found


def class_of(config: Mapping[str, Any]) -> str:
    """Return the class that a component's config names, of diffusers or transformers; empty: none."""
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), "")
    return name if isinstance(name, str) else ""


def fits(part: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a config is one of a component in this place; old ones name no class, and all of them fit."""
    name = class_of(config)
    return not name or name == _CLASS_OF.get(part, name)


def explain(kind: Kind | None) -> str:
    """Return what something is and what to do with it, as the second half of a sentence and more."""
    if kind is None:
        return "nothing that icexport knows"
    return f"{kind.title}. {kind.way_out}" if kind.way_out else kind.title
