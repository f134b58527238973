"""Draw a picture from a bundle and print how well it follows its control map.

icexport build --cond canny
python examples/draw.py builds/canny docs/images/apple.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import icexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path, help="its control map is extracted")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("out.png"))
    args = parser.parse_args()

    pipe = icexport.InnerControlPipeline.from_pretrained(args.bundle)
    profile = pipe.bundle.manifest.profile
    picture = Image.open(args.picture).resize((profile.width.opt, profile.height.opt))
    control_map = pipe.condition.extract(picture)
    generator = torch.Generator().manual_seed(0)
    out = pipe(args.prompt, image=control_map, num_inference_steps=args.steps, generator=generator)

    out.images[0].save(args.output)
    report = out.fidelity
    print(f"{report.metric}: {report.scores[0]:.3f}")
    for reading in report.steps:
        print(f"step {reading.index:2d}, t = {reading.timestep:3.0f}: probe error {reading.errors[0]:.4f}")


if __name__ == "__main__":
    main()
