"""Do the parts of one controlled model belong together?"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from icexport.errors import UsageError
from icexport.models.family import STABLE_DIFFUSION, Configs, Family, Pair
from icexport.models.probe import ProbeConfig
from icexport.models.source import ModelSource
from icexport.models.taps import Taps


def check_fit(
    configs: Configs,
    condition: str,
    probe: ProbeConfig | None = None,
    family: Family = STABLE_DIFFUSION,
) -> None:
    """Refuse parts that do not belong together, before the long work.

    Args:
        configs: configs of the base model's components and, where there is one, the ControlNet.
        condition: name of the condition that the ControlNet and the probe are for.
        probe: config of the probe.
        family: what the base model is taken for.

    Raises:
        UsageError: a part does not fit; everything that does not is listed.
    """
    problems = [
        f"{part} has {name} = {configs[part][name]!r}, which {family.title} do not"
        for part, names in family.unsupported.items()
        for name in names
        if part in configs and configs[part].get(name)
    ]
    pairs = list(family.pairs(configs))
    if probe is not None:
        pairs.append(("condition of probe and ControlNet", probe.condition or condition, condition))
        try:
            pairs += _probe_pairs(probe, configs["unet"])
        except (TypeError, ValueError, KeyError) as error:
            problems.append(f"the config of unet describes no UNet ({error})")
    problems += [f"{what} differ: {one} and {other}" for what, one, other in pairs if one != other]
    if problems:
        raise UsageError(
            f"These models do not work together: {'; '.join(problems)}. Choose those that were made for this base "
            "model and condition."
        )


def check_source(source: ModelSource) -> None:
    """Call ``check_fit`` for the parts of a model on this disk."""
    parts = ("unet", "controlnet", "vae", "text_encoder")
    probe = None if source.probe is None else ProbeConfig.from_dict(source.config("probe"))
    configs = {part: source.full_config(part) for part in parts} | {"tokenizer": source.base.tokenizer_config()}
    check_fit(configs, source.condition, probe, source.family)


def _probe_pairs(probe: ProbeConfig, unet_config: Any) -> list[Pair]:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    pairs: list[Pair] = [("taps of probe and unet", probe.dims, Taps(unet, probe.tap_kind).dims)]
    if probe.time_embed_dim is not None:
        width = unet.time_embedding.linear_2.out_features
        pairs.append(("time embedding of probe and unet", probe.time_embed_dim, width))
    return pairs
