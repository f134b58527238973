"""What diffusers' pipelines offer and engines cannot do: refused by name, where diffusers would seem to do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from icexport.errors import UnsupportedOptionError

_BAKED = (
    "engines have their weights baked in. Fuse the LoRA into the model with diffusers (pipe.load_lora_weights(FILE), "
    "pipe.fuse_lora(), pipe.save_pretrained(FOLDER)), then build a bundle from that folder"
)
_WORDS = (
    "engines have their weights baked in. Load the words with diffusers (pipe.load_textual_inversion(FILE)), "
    "save the model, then build a bundle from that folder"
)
IP_ADAPTERS = "IP-Adapters add attention layers that the exported UNet does not have"
_ATTENTION = "how attention is computed is up to the engine, none of which holds the whole table of scores"
_OFFLOAD = "an engine stays on its device. Where memory is short, load with low_memory=True"
_FREEU = "the UNet is one graph, in which no block can be scaled"
_SAVED = "the bundle is its saved form: copy that folder, pipe.bundle.path"
_HUB = "upload the bundle, a folder: huggingface_hub.upload_folder(folder_path=pipe.bundle.path, repo_id=...)"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("load_lora_weights", "load_lora_into_unet", "load_lora_into_text_encoder", "fuse_lora", "unfuse_lora"),
            *(
                "set_adapters",
                "delete_adapters",
                "enable_lora",
                "disable_lora",
                "enable_lora_hotswap",
                "set_lora_device",
            ),
            *("get_active_adapters", "get_list_adapters", "save_lora_weights", "unload_lora_weights"),
        ),
        _BAKED,
    ),
    **dict.fromkeys(("load_textual_inversion", "unload_textual_inversion"), _WORDS),
    **dict.fromkeys(
        (
            *("load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale", "encode_image"),
            "prepare_ip_adapter_image_embeds",
        ),
        IP_ADAPTERS,
    ),
    **dict.fromkeys(
        (
            *("enable_attention_slicing", "set_attention_slice", "enable_xformers_memory_efficient_attention"),
            *("set_use_memory_efficient_attention_xformers", "fuse_qkv_projections", "unfuse_qkv_projections"),
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(
        (
            *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
            "reset_device_map",
        ),
        _OFFLOAD,
    ),
    **dict.fromkeys(("enable_freeu", "disable_freeu"), _FREEU),
    "save_pretrained": _SAVED,
    "push_to_hub": _HUB,
    "from_single_file": "build a bundle from the file first: icexport build --model FILE --controlnet ... --cond ...",
    "from_config": "load a bundle: from_pretrained(BUNDLE)",
    "download": "load a bundle: from_pretrained(BUNDLE); icexport build --model HUB_ID makes one",
}
"""Public names of diffusers' pipelines that are refused, with the reason and the way out."""


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedOptionError(f"{name} is not supported: {REFUSED[name]}.")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {REFUSED[name]}.\n\n        Raises:\n            UnsupportedOptionError: raised always."
    return refuse


class Refusals:
    """Raises ``UnsupportedOptionError`` for every name in ``REFUSED``."""

    def disable_attention_slicing(self) -> None:
        """Do nothing: it is never on."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing: they are never on."""


for _name in REFUSED:
    setattr(Refusals, _name, staticmethod(_refusal(_name)))
