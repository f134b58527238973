"""Do the parts of one controlled model belong together?"""

from __future__ import annotations

from typing import Any

from icexport.errors import CheckpointError
from icexport.models.loading import ModelSource
from icexport.models.sizes import residual_channels

_UNSUPPORTED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def check_fit(source: ModelSource) -> None:
    """Refuse parts that do not belong together, before the long work.

    Raises:
        CheckpointError: listing everything that does not fit.
    """
    configs = {part: source.full_config(part) for part in ("unet", "controlnet", "vae", "text_encoder")}
    unet, controlnet, vae, text = configs.values()
    problems = [
        f"{part} has {name} = {configs[part][name]!r}, which Stable Diffusion 1 and 2 do not"
        for part in ("unet", "controlnet")
        for name in (*_UNSUPPORTED, "global_pool_conditions")
        if configs[part].get(name)
    ]
    if text.get("use_attention_mask"):
        problems.append("text_encoder has use_attention_mask = true, which the exported graph cannot take")
    for what, one, other in (
        ("latent channels of unet and vae", unet["in_channels"], vae["latent_channels"]),
        ("latent channels of controlnet and vae", controlnet["in_channels"], vae["latent_channels"]),
        ("text width of unet and text_encoder", unet["cross_attention_dim"], text["hidden_size"]),
        ("text width of controlnet and text_encoder", controlnet["cross_attention_dim"], text["hidden_size"]),
        ("residuals that unet takes and controlnet gives", residual_channels(unet), residual_channels(controlnet)),
    ):
        if one != other:
            problems.append(f"{what} differ: {one} and {other}")
    if source.probe_folder is not None:
        problems += _probe_problems(source, unet)
    if problems:
        raise CheckpointError(f"These models do not work together: {'; '.join(problems)}.")


def _probe_problems(source: ModelSource, unet_config: dict[str, Any]) -> list[str]:
    import torch
    from diffusers import UNet2DConditionModel

    from icexport.models.probe import ProbeConfig
    from icexport.models.taps import Taps

    config = ProbeConfig.from_dict(source.config("probe"))
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
    except (TypeError, ValueError, KeyError) as error:
        return [f"unet/config.json describes no UNet ({error})"]
    pairs: list[tuple[str, object, object]] = [
        ("condition of probe and build", config.condition or source.condition, source.condition),
        ("taps of probe and unet", config.dims, Taps(unet, config.tap_kind).dims),
    ]
    if config.time_embed_dim is not None:
        width = unet.time_embedding.linear_2.out_features
        pairs.append(("time embedding of probe and unet", config.time_embed_dim, width))
    return [f"{what} differ: {one} and {other}" for what, one, other in pairs if one != other]
