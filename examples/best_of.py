"""Draw several pictures of one control map and keep the one that follows it best.

icexport build --cond canny
python examples/best_of.py builds/canny docs/images/apple.png --pictures 8
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
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("best.png"))
    args = parser.parse_args()

    pipe = icexport.InnerControlPipeline.from_pretrained(args.bundle)
    profile = pipe.bundle.manifest.profile
    picture = Image.open(args.picture).resize((profile.width.opt, profile.height.opt))
    control_map = pipe.condition.extract(picture)

    scored = []
    for seed in range(args.pictures):
        generator = torch.Generator().manual_seed(seed)
        out = pipe(args.prompt, image=control_map, num_inference_steps=args.steps, generator=generator)
        scored.append((out.fidelity.scores[0], seed, out.images[0]))
        print(f"seed {seed}: {pipe.condition.metric} {scored[-1][0]:.3f}")
    best = (max if pipe.condition.higher_is_better else min)(scored, key=lambda row: row[0])
    best[2].save(args.output)
    print(f"seed {best[1]} follows its map best: {args.output}")


if __name__ == "__main__":
    main()
