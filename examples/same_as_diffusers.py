"""Draw one picture with a bundle and one with diffusers on the model that it was made from: how different are they?

icexport build --cond canny
python examples/same_as_diffusers.py builds/canny reference
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import icexport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model", help="diffusers folder with controlnet-<condition> in it, or: reference")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    ours = icexport.InnerControlPipeline.from_pretrained(args.bundle)
    folder = icexport.reference_path() if args.model == "reference" else Path(args.model)
    controlnet = ControlNetModel.from_pretrained(
        folder / f"controlnet-{ours.condition.name}", torch_dtype=torch.float32
    )
    theirs = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=controlnet.float(), safety_checker=None, torch_dtype=torch.float32
    )
    profile = ours.bundle.manifest.profile
    control_map = torch.zeros(1, 3, profile.height.opt, profile.width.opt)
    control_map[..., profile.width.opt // 2] = 1

    pictures = [
        pipe(
            "a red apple",
            image=control_map,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for pipe in (ours, theirs)
    ]
    difference = (pictures[0] - pictures[1]).abs().max()
    print(f"largest difference of a value in [0,1]: {difference:.2g}")


if __name__ == "__main__":
    main()
