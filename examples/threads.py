"""Draw in several threads, which share one pipeline.

icexport build --cond canny
python examples/threads.py builds/canny
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import icexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    args = parser.parse_args()

    pipe = icexport.InnerControlPipeline.from_pretrained(args.bundle)
    pipe.set_progress_bar_config(disable=True)
    profile = pipe.bundle.manifest.profile
    control_map = torch.zeros(1, 3, profile.height.opt, profile.width.opt)
    control_map[..., profile.height.opt // 4, :] = 1  # a horizon

    def draw(seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return pipe("a room", image=control_map, num_inference_steps=args.steps, generator=generator).images[0]

    args.output.mkdir(exist_ok=True)
    with ThreadPoolExecutor(args.threads) as pool:
        for seed, picture in enumerate(pool.map(draw, range(args.pictures))):
            picture.save(args.output / f"{seed}.png")
    print(f"{args.pictures} pictures are in {args.output}")


if __name__ == "__main__":
    main()
