"""Judge the reference model on held-out icons and write its model card, contact sheet and curves.

    python -m training.report --work runs/reference --model runs/reference/model --docs docs/images --machine "2 cores"

Control is measured three ways on the same held-out maps: pictures made with the control, the same prompts and seeds
with scale 0, and the pictures with control against *other* pictures' maps (what busy pictures reach by chance).
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch.nn import functional as F

from icexport import conditions
from icexport.models.probe import InnerControlProbe
from icexport.models.taps import Taps
from training.data import icons
from training.reference import RECIPE
from training.vae import reconstruction_psnr

logger = logging.getLogger(__name__)

MAPS = 160
STEPS = 20
GUIDANCE = 3.0
BATCH = 16
SHOWN = 12


def prompt_of(pictures: icons.IconSet, index: int) -> str:
    """The full caption of one picture: name, colours, style."""
    name, style, colors = (str(getattr(pictures, f)[index]) for f in ("names", "styles", "colors"))
    words = [c for c in colors.split(",") if c and c not in name.split()]
    return f"{name}, {' and '.join(words)}, {style} icon" if words else f"{name}, {style} icon"


def load(model: Path) -> tuple[StableDiffusionControlNetPipeline, InnerControlProbe]:
    """Diffusers' own pipeline on the model's folder, in float32, and the probe."""
    controlnet = ControlNetModel.from_pretrained(model / "controlnet-canny")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=controlnet, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, InnerControlProbe.from_pretrained(model / "probe-canny").float().eval()


@torch.no_grad()
def generate(
    pipe: StableDiffusionControlNetPipeline, prompts: list[str], maps: torch.Tensor, scale: float
) -> torch.Tensor:
    """Pictures ``[N,3,H,W]`` in [0,1]; picture i is drawn with seed i."""
    found = []
    for start in range(0, len(prompts), BATCH):
        stop = min(start + BATCH, len(prompts))
        found.append(
            pipe(
                prompts[start:stop],
                image=maps[start:stop],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                controlnet_conditioning_scale=scale,
                generator=[torch.Generator().manual_seed(i) for i in range(start, stop)],
                output_type="pt",
            ).images
        )
    return torch.cat(found)


@torch.no_grad()
def probe_errors(
    pipe: StableDiffusionControlNetPipeline, probe: InnerControlProbe, latents: torch.Tensor, maps: torch.Tensor
) -> tuple[dict[int, dict[str, float]], torch.Tensor]:
    """The probe's error at several noise levels, and the leak test.

    Latents of one picture get the control map of *another*: a probe that reads the picture stays close to the
    picture's own map, one that reads the control out of the residuals is close to the other's.

    Returns:
        By timestep: ``matched`` (own control), ``to_picture`` and ``to_control`` (foreign control); and the readings
        at timestep 200 with the own control, ``[N,3,h,w]`` in [0,1].
    """
    unet, controlnet, taps = pipe.unet, pipe.controlnet, Taps(pipe.unet, "attn")
    empty = pipe.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)[0].expand(len(latents), -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rows: dict[int, dict[str, float]] = {}
    shown = torch.empty(0)
    for timestep in (0, 200, 400, 600, 800, 920, 999):
        steps = torch.full((len(latents),), timestep)
        noisy = pipe.scheduler.add_noise(latents, noise, steps)
        readings = []
        for control in (maps, maps.roll(1, 0)):
            down, mid = controlnet(noisy, steps, empty, control, return_dict=False)
            with taps.record() as features:
                unet(noisy, steps, empty, down_block_additional_residuals=down, mid_block_additional_residual=mid)
            readings.append((probe(features, unet.time_embedding(unet.time_proj(steps))) + 1) / 2)
        target = F.adaptive_avg_pool2d(maps, readings[0].shape[-2:])
        rows[timestep] = {
            "matched": float(F.mse_loss(readings[0], target)),
            "to_picture": float(F.mse_loss(readings[1], target)),
            "to_control": float(F.mse_loss(readings[1], target.roll(1, 0))),
        }
        shown = readings[0] if timestep == 200 else shown
    return rows, shown


def measure(model: Path, work: Path) -> tuple[dict[str, Any], Image.Image]:
    """Everything that the model card states, and the contact sheet."""
    pictures = icons.prepare(work / "data")
    held_out = pictures.subset(pictures.held_out)
    canny = conditions.get("canny")
    pixels = torch.from_numpy(held_out.images).permute(0, 3, 1, 2)
    maps = canny.extract_batch(pixels.float() / 255)
    drawn = maps.mean((1, 2, 3)) > 0.02  # a nearly blank map cannot be followed or missed
    index = torch.nonzero(drawn)[:, 0][torch.randperm(int(drawn.sum()), generator=torch.Generator().manual_seed(0))]
    index = index[:MAPS]
    pixels, maps = pixels[index], maps[index]
    prompts = [prompt_of(held_out, int(i)) for i in index]

    pipe, probe = load(model)
    controlled, free = generate(pipe, prompts, maps, 1.0), generate(pipe, prompts, maps, 0.0)
    latents = pipe.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    decoded = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1) + 1) / 2
    readings, heat = probe_errors(pipe, probe, latents, maps)
    scores = {
        "control": canny.score(controlled, maps),
        "scale 0": canny.score(free, maps),
        "other maps": canny.score(controlled, maps.roll(1, 0)),
        "autoencoder": canny.score(decoded, maps),
    }
    result = {
        "maps": len(index),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": type(pipe.scheduler).__name__,
        "edge_f1": {name: round(float(s.mean()), 4) for name, s in scores.items()},
        "reconstruction_psnr_db": round(float(reconstruction_psnr(pipe.vae, pixels).mean()), 2),
        "probe_mse": readings,
        "data": icons.manifest(pictures),
        "megabytes": round(sum(p.stat().st_size for p in model.rglob("*") if p.is_file()) / 1e6, 1),
    }
    columns = [
        pixels.float() / 255, maps, controlled, F.interpolate(heat, size=64), free,
    ]  # fmt: skip
    return result, contact_sheet(prompts[:SHOWN], [c[:SHOWN] for c in columns])


def contact_sheet(prompts: list[str], rows: list[torch.Tensor]) -> Image.Image:
    """One row for each kind of picture, one column for each prompt, labelled."""
    labels = ("held-out icon", "control map", "with control", "probe, t=200", "scale 0")
    figure, axes = plt.subplots(len(rows), len(prompts), figsize=(1.5 * len(prompts), 1.62 * len(rows)))
    for y, (label, row) in enumerate(zip(labels, rows, strict=True)):
        for x, picture in enumerate(row):
            axes[y, x].imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[y, x].set(xticks=[], yticks=[])
            if y == 0:
                axes[y, x].set_title(prompts[x].replace(", ", ",\n"), fontsize=6)
        axes[y, 0].set_ylabel(label, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
    plt.close(figure)
    return picture


def loss_curves(work: Path, output: Path) -> None:
    """One panel for each stage, from the ``.jsonl`` files in ``work``."""
    files = [work / f"{name}.jsonl" for name in ("vae", "unet", "controlnet-canny", "probe-canny")]
    figure, axes = plt.subplots(1, len(files), figsize=(3.2 * len(files), 2.6))
    for axis, file in zip(axes, files, strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        axis.plot([r["step"] for r in rows], [r["loss"] for r in rows])
        axis.set(title=file.stem, xlabel="update", yscale="log")
    axes[0].set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(output, dpi=90)
    plt.close(figure)


CARD = """# The reference model of icexport

A Stable Diffusion in miniature with a canny ControlNet and an InnerControl probe: diffusers' own classes, CLIP's own
vocabulary of 49,408 tokens, 64 x 64 px, latents 16 x 16 x 4, velocity prediction, fp16 safetensors, {megabytes} MB.
It exists so that every part of icexport can be run, tested and measured without a download. It draws icons; it is not
a model for anything else. Apache-2.0.

## How well it works

{maps} held-out icons, {scheduler}, {steps} steps, guidance {guidance}, seed i for picture i, fp32 PyTorch. Edge F1
with 1 px tolerance of the pictures' canny edges (60/140) against the control map:

| pictures | edge F1 |
|---|---|
| with control | {control:.3f} |
| same prompts and seeds, scale 0 | {free:.3f} |
| with control, against other pictures' maps (chance) | {other:.3f} |
| the icons themselves through the autoencoder (ceiling) | {autoencoder:.3f} |

Autoencoder reconstruction of the same icons: {psnr:.1f} dB.

The probe's mean squared error on these icons at the probe's resolution (both in [0,1]), with the icon's own control
map, and with *another* icon's map fed to the ControlNet (the leak test: a probe that only read the residuals would
match the foreign map, not the picture):

| timestep | own map | foreign map: error to the picture's edges | foreign map: error to the foreign map |
|---|---|---|---|
{probe}

![held-out icons](../../../docs/images/reference-contact-sheet.png)

## Training

    pip install -c constraints.txt -e '.[train]'
    pip install --no-deps open-clip-torch==3.3.0     # CLIP's byte-pair-encoding file; the package is not imported
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m training.reference --work runs/reference
    python -m training.report --work runs/reference --model runs/reference/model --docs docs/images --machine '...'

Trained on {machine}. The recipe (seeds are 0 unless it says otherwise):

```toml
{recipe}```

![loss curves](../../../docs/images/reference-curves.png)

## Data

{pictures} pictures of {concepts} concepts in five styles, rendered on white; {held_out} (concept, style) pairs are
held out by a hash and never trained on. Captions are the icon's name with its main colours and its style; every
picture is also trained on mirrored and with turned hues, so that colour words mean colours. SHA-256 of all
pixels and names: `{sha256}`.

| npm package | version | style word | pictures | licence |
|---|---|---|---|---|
{sources}

Names of the 3D set: {names}.
"""


def model_card(result: dict[str, Any], machine: str) -> str:
    """The model card, every number from ``measure``."""
    data, scores = result["data"], result["edge_f1"]
    probe = "\n".join(
        f"| {t} | {r['matched']:.4f} | {r['to_picture']:.4f} | {r['to_control']:.4f} |"
        for t, r in result["probe_mse"].items()
    )
    sources = "\n".join(
        f"| {s['package']} | {s['version']} | {s['style']} | {s['pictures']} | {s['licence']} |"
        for s in data["sources"]
    )
    values = {key: result[key] for key in ("megabytes", "maps", "scheduler", "steps", "guidance")}
    values |= {key: data[key] for key in ("pictures", "concepts", "held_out", "sha256")}
    return CARD.format(
        **values,
        control=scores["control"],
        free=scores["scale 0"],
        other=scores["other maps"],
        autoencoder=scores["autoencoder"],
        psnr=result["reconstruction_psnr_db"],
        probe=probe,
        sources=sources,
        names="{package} {version} ({licence})".format(**data["names"]),
        recipe=RECIPE.read_text(),
        machine=machine,
    )


def main() -> None:
    """Command line of ``python -m training.report``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the training's folder: data and loss curves")
    parser.add_argument("--model", type=Path, required=True, help="the model; metrics.json is written beside it")
    parser.add_argument("--docs", type=Path, required=True, help="where contact sheet and curves go")
    parser.add_argument("--machine", required=True, help="what it was trained on, for the model card")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    result, sheet = measure(args.model, args.work)
    args.docs.mkdir(parents=True, exist_ok=True)
    sheet.save(args.docs / "reference-contact-sheet.png", optimize=True)
    loss_curves(args.work, args.docs / "reference-curves.png")
    (args.model / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.model / "README.md").write_text(model_card(result, args.machine))
    logger.info("%s", json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
