"""Train the embedded reference model from nothing: autoencoder, UNet and text encoder, canny ControlNet, probe.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m training.reference --work runs/reference

Every stage resumes from its last checkpoint in ``--work``; a finished stage is skipped. The result is an ordinary
diffusers folder with fp16 safetensors.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import UniPCMultistepScheduler

from training import dataset
from training import tokenizer as clip
from training.controlnet import train_controlnet
from training.data import icons
from training.layout import save_text_encoder, save_tokenizer
from training.loop import StageConfig, world
from training.probe import train_probe
from training.unet import noise_scheduler, train_unet
from training.vae import reconstruction_psnr, train_vae

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""Makes the folder loadable as a diffusers pipeline."""

RECIPE = Path(__file__).parent / "recipes" / "reference.toml"


def stages(recipe: Path) -> dict[str, StageConfig]:
    """The stage settings of a recipe file, by the stage's name."""
    return {name: StageConfig(**values) for name, values in tomllib.loads(recipe.read_text()).items()}


def train(work: Path, output: Path, recipe: Path, bpe_file: Path) -> None:
    """Run every stage of ``recipe`` in ``work`` and write the finished model to ``output`` (rank 0)."""
    settings, rank = stages(recipe), world()[0]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    pictures = icons.prepare(work / "data")
    training = pictures.subset(~pictures.held_out)
    images = torch.from_numpy(training.images).permute(0, 3, 1, 2).contiguous()
    tokens = clip.clip_tokenizer(bpe_file)

    held_out = torch.from_numpy(pictures.images[pictures.held_out]).permute(0, 3, 1, 2)

    vae = train_vae(images, settings["vae"], work)
    logger.info("vae: held-out reconstruction %.2f dB", reconstruction_psnr(vae, held_out).mean())
    data = dataset.prepare(training, vae, tokens, settings["unet"].seed, work / "dataset.safetensors")
    unet, text_encoder = train_unet(data, tokens, settings["unet"], work)
    controlnet = train_controlnet(data, unet, text_encoder, settings["controlnet"], work)
    probe = train_probe(data, unet, text_encoder, controlnet, settings["probe"], work)
    if rank == 0:
        for name, module in {"vae": vae, "unet": unet}.items():
            module.half().save_pretrained(output / name)
        save_text_encoder(text_encoder.half(), output / "text_encoder")
        _load_as_float32(output / "text_encoder" / "config.json")
        controlnet.half().save_pretrained(output / "controlnet-canny")
        probe.half().save_pretrained(output / "probe-canny")
        save_tokenizer(tokens, output / "tokenizer")
        UniPCMultistepScheduler.from_config(noise_scheduler().config).save_pretrained(output / "scheduler")
        (output / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def _load_as_float32(config: Path) -> None:
    """Transformers loads in the dtype that the config names, diffusers in float32: let a pipeline be of one dtype."""
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    """Command line of ``python -m training.reference``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, loss curves and pictures")
    parser.add_argument("--output", type=Path, default=None, help="the model's folder (default: WORK/model)")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--bpe-file", type=Path, default=None, help="CLIP's BPE file (default: of open-clip-torch)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    train(args.work, args.output or args.work / "model", args.recipe, args.bpe_file or clip.find_bpe_file())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
