"""Model families: what a base model consists of, which configs do not fit, and how it is split into graphs.

Imports no torch: a cache hit of ``build`` does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icexport.errors import CheckpointError
from icexport.models.sizes import control_map_factor, residual_channels, vae_factor

Configs = Mapping[str, Mapping[str, Any]]
"""Configs of the components, with their classes' defaults: ``unet``, ``vae``, ``text_encoder`` and, where they are
known, ``controlnet`` and ``tokenizer``."""
Pair = tuple[str, object, object]
"""What has to be equal, in words, and both values."""


@dataclass(frozen=True)
class Family:
    """One kind of base model.

    Attributes:
        name: name of the family, as the manifest records it.
        title: what people call these models.
        pipelines: classes of diffusers' pipelines that such models are saved by; () for the family that every other
            model is taken for.
        parts: folders of the base model that a bundle depends on.
        needed: files without which a model is none.
        unsupported: config keys of each component that models of this family leave empty.
        pairs: what has to fit between the components, from their configs.
        graph_names: names of the graphs; a model without a probe lacks ``probe``.
        graphs: module whose ``split(source, dtype)`` gives the graphs; imported when asked, for it imports torch.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    parts: tuple[str, ...]
    needed: tuple[str, ...]
    unsupported: Mapping[str, tuple[str, ...]]
    pairs: Callable[[Configs], list[Pair]]
    graph_names: tuple[str, ...]
    graphs: str


def _stable_diffusion_pairs(configs: Configs) -> list[Pair]:
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    pairs: list[Pair] = [
        ("latent channels of unet and vae", unet["in_channels"], vae["latent_channels"]),
        ("text width of unet and text_encoder", unet["cross_attention_dim"], text["hidden_size"]),
    ]
    if "tokenizer" in configs:
        # Diffusers fills prompts to the length that the tokenizer's file says, and the graph takes the text encoder's.
        length = configs["tokenizer"].get("model_max_length") or "not said"
        taken = text["max_position_embeddings"]
        pairs.append(("tokens of a prompt of tokenizer and text_encoder", length, taken))
    if "controlnet" in configs:
        net = configs["controlnet"]
        pairs += [
            ("latent channels of controlnet and vae", net["in_channels"], vae["latent_channels"]),
            ("text width of controlnet and text_encoder", net["cross_attention_dim"], text["hidden_size"]),
            ("residuals that unet takes and controlnet gives", residual_channels(unet), residual_channels(net)),
            ("pixels per latent cell of controlnet and vae", control_map_factor(net), vae_factor(vae)),
        ]
    return pairs


_UNET_KEYS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")

STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    title="Stable Diffusion 1 and 2",
    pipelines=(),
    parts=("unet", "vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor"),
    needed=(
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ),
    unsupported={
        "unet": _UNET_KEYS,
        "controlnet": (*_UNET_KEYS, "global_pool_conditions"),
        # The exported text encoder takes no attention mask.
        "text_encoder": ("use_attention_mask",),
    },
    pairs=_stable_diffusion_pairs,
    graph_names=("text_encoder", "controlnet", "unet", "probe", "vae_decoder"),
    graphs="icexport.graphs.stable_diffusion",
)

FAMILIES = {family.name: family for family in (STABLE_DIFFUSION,)}


def family_of(pipeline: str | None) -> Family:
    """Return the family of a base model.

    Args:
        pipeline: class name in the model's ``model_index.json``; None: it has none.
    """
    return next((family for family in FAMILIES.values() if pipeline in family.pipelines), STABLE_DIFFUSION)


def family(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        CheckpointError: this icexport knows no such family.
    """
    if name not in FAMILIES:
        raise CheckpointError(f"There is no model family {name!r} in this icexport. Known: {', '.join(FAMILIES)}.")
    return FAMILIES[name]
