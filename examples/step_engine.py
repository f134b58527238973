"""Draw pictures of different steps, schedulers and guidance together, and let one join while others are drawn.

icexport build --cond canny
python examples/step_engine.py builds/canny docs/images/apple.png
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
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    args = parser.parse_args()

    pipe = icexport.InnerControlPipeline.from_pretrained(args.bundle)
    profile = pipe.bundle.manifest.profile
    picture = Image.open(args.picture).resize((profile.width.opt, profile.height.opt))
    control_map = pipe.condition.extract(picture)

    def request(seed: int, **options: object) -> object:
        generator = torch.Generator().manual_seed(seed)
        return pipe.step_requests(args.prompt, control_map, generator=generator, **options)[0]

    engine = pipe.step_engine
    waiting = {
        "quick": request(0, num_inference_steps=4),
        "careful": request(1, num_inference_steps=20, guidance_scale=3.0),
        "unguided": request(2, num_inference_steps=12, guidance_scale=1.0, controlnet_conditioning_scale=0.5),
    }
    tickets = {engine.admit(one): name for name, one in waiting.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    step = 0
    while drawn := engine.step():
        step += 1
        if step == 3:  # any thread may admit a picture at any time
            tickets[engine.admit(request(3, num_inference_steps=6))] = "late"
        for ticket in [ticket for ticket in tickets if ticket.done()]:
            name = tickets.pop(ticket)
            pipe.pictures(ticket.result())[0].save(args.output / f"{name}.png")
            print(f"call {step}, of {drawn} pictures: {name} is done")


if __name__ == "__main__":
    main()
