"""Writes the model folders: random weights in fp32, as diffusers and transformers save them.

    python -m benchmarks.real_size.model FOLDER --size sd15

Folders that are there already stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.sd15 import fill_zeros, sd15_controlnet, sd15_text_encoder, sd15_unet, sd15_vae
from icexport import reference_path
from icexport.host.files import replacing
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.taps import Taps

SIZES = ("sd15", "tiny")
_MARK = "random.json"


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def write_model(folder: Path, size: str, tell: Callable[[str], None] = _tell) -> None:
    """Write a base model, and in it a ControlNet and a probe for canny.

    Args:
        folder: the base model's folder; it is replaced unless it is complete and of this size.
        size: ``sd15``: Stable Diffusion 1.5's architecture, 512 px; ``tiny``: the reference model's, 64 px.
        tell: called with what happens.

    Raises:
        ValueError: the tokenizer has more words than the text encoder.
    """
    if (folder / _MARK).is_file() and json.loads((folder / _MARK).read_text())["size"] == size:
        tell(f"{folder} is there")
        return
    tell("making random weights")
    torch.manual_seed(0)
    models = _sd15() if size == "sd15" else _tiny()
    tokenizer = CLIPTokenizer.from_pretrained(reference_path() / "tokenizer")
    words = models["text_encoder"].config.vocab_size
    if len(tokenizer) > words:
        raise ValueError(f"The tokenizer has {len(tokenizer)} words, the text encoder {words}.")
    controlnet, probe = models.pop("controlnet"), models.pop("probe")
    pipeline = StableDiffusionPipeline(
        **models,
        tokenizer=tokenizer,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with replacing(folder) as partial:
        tell("writing the base model")
        pipeline.save_pretrained(partial)
        tell("writing ControlNet and probe")
        controlnet.save_pretrained(partial / "controlnet-canny")
        probe.save_pretrained(partial / "probe-canny")
        (partial / _MARK).write_text(json.dumps({"size": size}) + "\n")
    tell(f"wrote {folder}")


def _sd15() -> dict[str, Any]:
    unet = sd15_unet()
    probe = InnerControlProbe(ProbeConfig(dims=Taps(unet).dims, condition="canny"))
    return {
        "unet": unet,
        "vae": sd15_vae(),
        "text_encoder": sd15_text_encoder(),
        "controlnet": sd15_controlnet(unet),
        "probe": probe,
    }


def _tiny() -> dict[str, Any]:
    """Return the reference model without what it has learned."""
    folder = reference_path()

    def config(part: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        return found

    controlnet = ControlNetModel.from_config(config("controlnet-canny"))
    fill_zeros(controlnet)
    return {
        "unet": UNet2DConditionModel.from_config(config("unet")),
        "vae": AutoencoderKL.from_config(config("vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
        "controlnet": controlnet,
        "probe": InnerControlProbe(ProbeConfig.from_dict(config("probe-canny"))),
    }


def _scheduler() -> DDIMScheduler:
    """Return Stable Diffusion 1.5's noise schedule; DDIM calls the UNet once a step, from the first one on."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def main() -> None:
    """Run the command line of ``python -m benchmarks.real_size.model``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="sd15")
    args = parser.parse_args()
    write_model(args.folder, args.size)


if __name__ == "__main__":
    main()
