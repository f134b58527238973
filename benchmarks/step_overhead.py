"""What a step costs beside its models: the step engine against diffusers' loop, on engines that compute nothing.

    python -m benchmarks.step_overhead

Stable Diffusion 1.5's sizes at 512 px, guided, on the CPU: milliseconds between two calls of the UNet (median), for
one picture and for several at once. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import PNDMScheduler
from torch import Tensor

from benchmarks.real_size.growth import configs
from engines.base import TensorSpec
from icexport.graphs.profile import Profile, SizeRange
from icexport.host.versions import machine
from icexport.models.sizes import residual_channels, vae_factor
from icexport.runtime.coefficients import coefficients
from icexport.runtime.components import EngineControlNet, EngineTextEncoder, EngineUNet, EngineVae
from icexport.runtime.eager import eager_pipeline
from icexport.runtime.rows import StepModels
from icexport.runtime.schedulers import choose_scheduler
from icexport.runtime.slots import StepRequest
from icexport.runtime.step_engine import StepEngine

_SIDE, _STEPS, _GUIDANCE = 512, 20, 7.5
_TOKENS = 77
_PICTURES = (1, 2, 4)
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_PLAIN = {"clip_sample": False, "set_alpha_to_one": False}


class Nothing:
    """An engine that gives the same tensors at every call, at once; see ``engines.Engine``.

    Attributes:
        times: when it was called, in seconds.
    """

    backend, device = "nothing", torch.device("cpu")

    def __init__(self, name: str, inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.name, self.inputs = name, tuple(inputs)
        self.outputs = tuple(
            TensorSpec(output, torch.float32, ("samples", *shape)) for output, shape in shapes.items()
        )
        self.times: list[float] = []
        self._shapes = shapes
        self._made: dict[int, dict[str, Tensor]] = {}

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return zeros for as many rows as there are."""
        self.times.append(time.perf_counter())
        rows = len(inputs["sample"])
        if rows not in self._made:
            self._made[rows] = {name: torch.zeros(rows, *shape) for name, shape in self._shapes.items()}
        return {name: self._made[rows][name] for name in outputs or self._shapes}

    def close(self) -> None:
        """Do nothing."""


def engines() -> tuple[Nothing, Nothing, dict[str, Any]]:
    """Return a ControlNet and a UNet of Stable Diffusion 1.5's sizes, and the configs of all models."""
    known = configs()
    cells = _SIDE // vae_factor(known["vae"])
    common = (
        TensorSpec("sample", torch.float32, ("samples", 4, cells, cells)),
        TensorSpec("timestep", torch.float32, ("samples",)),
        TensorSpec("prompt_embeds", torch.float32, ("samples", _TOKENS, known["unet"]["cross_attention_dim"])),
    )
    shapes = {
        f"residual_{i}": (channels, cells // scale, cells // scale)
        for i, (channels, scale) in enumerate(residual_channels(known["controlnet"]))
    }
    unet = Nothing("unet", common, {"noise_pred": (4, cells, cells)})
    return Nothing("controlnet", common, shapes), unet, known


def of_step_engine(scheduler: Any, pictures: int) -> float:
    """Return the milliseconds between two calls of the UNet in the step engine."""
    controlnet, unet, known = engines()
    models = StepModels(controlnet, unet, None, residual_channels(known["controlnet"]), max(_PICTURES))
    side, factor = SizeRange.parse(_SIDE), vae_factor(known["vae"])
    engine = StepEngine(models, Profile(SizeRange(1, 1, max(_PICTURES)), side, side), factor)
    weights = coefficients(scheduler, _STEPS)
    request = StepRequest(
        weights,
        torch.randn(1 + weights.draws, 4, _SIDE // factor, _SIDE // factor),
        torch.zeros(2, _TOKENS, known["unet"]["cross_attention_dim"]),
        torch.zeros(3, _SIDE, _SIDE),
        [1.0] * weights.calls,
        _GUIDANCE,
    )
    engine.drive([engine.admit(request) for _ in range(pictures)])
    return _between(unet.times)


def of_diffusers(scheduler: Any, pictures: int) -> float:
    """Return the milliseconds between two calls of the UNet in diffusers' loop."""
    controlnet, unet, known = engines()
    pipe = eager_pipeline(
        unet=EngineUNet(unet, known["unet"]),
        controlnet=EngineControlNet(controlnet, known["controlnet"]),
        text_encoder=EngineTextEncoder(unet, known["text_encoder"]),
        vae=EngineVae(unet, known["vae"]),
        tokenizer=None,
        scheduler=scheduler,
    )
    embeds = torch.zeros(1, _TOKENS, known["unet"]["cross_attention_dim"])
    with torch.no_grad():
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            image=torch.zeros(1, 3, _SIDE, _SIDE),
            num_inference_steps=_STEPS,
            num_images_per_prompt=pictures,
            guidance_scale=_GUIDANCE,
            output_type="latent",
        )
    return _between(unet.times)


def _between(times: list[float]) -> float:
    # The first steps fill caches and allocate.
    return 1000 * statistics.median(b - a for a, b in pairwise(times[2:]))


def measured(rounds: int) -> list[dict[str, Any]]:
    """Return one row for each scheduler and number of pictures: both in turn, medians of the rounds."""
    own = PNDMScheduler.from_config({**_NOISE, **_PLAIN, "skip_prk_steps": True})
    rows = []
    for name in ("UniPC", "DDIM", "PNDM", "DPMSolverMultistep", "EulerAncestralDiscrete"):
        for pictures in _PICTURES:
            scheduler = choose_scheduler(name, own)
            pairs = [(of_diffusers(scheduler, pictures), of_step_engine(scheduler, pictures)) for _ in range(rounds)]
            theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows.append(
                {
                    "scheduler": name,
                    "pictures": pictures,
                    "diffusers ms": round(theirs, 3),
                    "step engine ms": round(ours, 3),
                    "share": round(ours / theirs, 3),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of ``python -m benchmarks.step_overhead``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="pictures of each kind (default 5)")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error("--rounds: must be at least 1")
    rows = measured(args.rounds)
    columns = list(rows[0])
    sys.stdout.write(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
    for row in rows:
        sys.stdout.write(f"| {' | '.join(map(str, row.values()))} |\n")
    sys.stdout.write(json.dumps({"machine": machine("cpu"), "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
