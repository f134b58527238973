"""Draws one picture in this process and times its steps: from a bundle, or with diffusers from the model's folder.

    python -m benchmarks.real_size.draw bundle FOLDER --control MAP.png --result NAME
    python -m benchmarks.real_size.draw diffusers FOLDER --dtype bf16 --control MAP.png --result NAME

Writes NAME.json and NAME.png. Both draw the same picture with the same calls of the models: a bundle is not asked for
fidelity. A step is the time between the ends of two steps, so that neither loading nor decoding is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

from benchmarks.real_size.stages import GUIDANCE, PROMPT, SEED, STEPS
from icexport.host.files import write_whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_diffusers(folder: Path, dtype: torch.dtype) -> StableDiffusionControlNetPipeline:
    """Return diffusers' own pipeline as its documentation loads it."""
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet-canny", torch_dtype=dtype)
    return StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=controlnet, torch_dtype=dtype)


def draw(pipe: Any, control: Image.Image, **options: Any) -> tuple[Image.Image, list[float]]:
    """Return a picture, and the seconds of every step but the first, which also allocates."""
    ends: list[float] = []

    def ended(_pipe: Any, step: int, _time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(time.perf_counter())
        sys.stderr.write(f"step {step + 1}\n")
        return tensors

    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        PROMPT,
        image=control,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=ended,
        callback_on_step_end_tensor_inputs=[],
        **options,
    )
    return found.images[0], [b - a for a, b in pairwise(ends)]


def main() -> None:
    """Run the command line of ``python -m benchmarks.real_size.draw``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("bundle", "diffusers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of diffusers; a bundle has its own")
    parser.add_argument("--control", type=Path, required=True, help="control map")
    parser.add_argument("--result", required=True, help="path without .json and .png")
    args = parser.parse_args()
    control = Image.open(args.control)
    started = time.perf_counter()
    options: dict[str, Any] = {}
    if args.kind == "bundle":
        from icexport import InnerControlPipeline  # not beside the baseline, whose memory counts, too

        pipe: Any = InnerControlPipeline.from_pretrained(args.folder, backend="onnxruntime", device="cpu")
        options["check_fidelity"] = False
    else:
        pipe = load_diffusers(args.folder, DTYPES[args.dtype])
    loaded = time.perf_counter()
    sys.stderr.write(f"loaded in {loaded - started:.1f} s\n")
    picture, seconds = draw(pipe, control, **options)
    found = {
        "seconds_per_step": round(statistics.median(seconds), 4),
        "step_seconds": [round(value, 4) for value in seconds],
        "load_seconds": round(loaded - started, 2),
        "draw_seconds": round(time.perf_counter() - loaded, 2),
        "torch_threads": torch.get_num_threads(),
    }
    picture.save(f"{args.result}.png")
    write_whole(Path(f"{args.result}.json"), json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
