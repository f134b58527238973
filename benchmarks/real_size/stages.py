"""The stages: what each one runs, needs and makes. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

PROMPT, STEPS, GUIDANCE, SEED = "a red apple", 4, 7.5, 0
SIDES = {"sd15": 512, "tiny": 64}
LARGE = 768
"""Pixels at which the reference model's attention has as many tokens as no Stable Diffusion has at its own size."""

_RESULTS = "stages"


@dataclass(frozen=True)
class Stage:
    """One process to measure.

    Attributes:
        name: name of the stage, and of its files in ``stages``.
        arguments: what Python gets; paths are relative to the output folder.
        needs: paths that have to be there.
        makes: folder that is removed before, so that the stage makes it; empty: none.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    makes: str = ""

    def file(self, suffix: str) -> Path:
        """Return the path of one of its files, relative to the output folder."""
        return Path(_RESULTS, f"{self.name}{suffix}")


def all_stages(size: str, build_options: Sequence[str] = ()) -> list[Stage]:
    """Return the stages for ``sd15`` or ``tiny``, in their order.

    Args:
        size: size of the model.
        build_options: further options of ``icexport build``.
    """
    control = f"control-{SIDES[size]}.png"
    stages = [Stage("model", ("-m", "benchmarks.real_size.model", "model", "--size", size))]
    builds = {dtype: _build("model", dtype, f"bundle-{dtype}", build_options) for dtype in ("fp32", "fp16")}
    for dtype, command in builds.items():
        stages.append(Stage(f"build-{dtype}", command, ("model/random.json",), f"bundle-{dtype}"))
    for dtype, command in builds.items():
        bundle = f"bundle-{dtype}"
        made = (f"{bundle}/icexport.json",)
        stages += [
            Stage(f"hit-{dtype}", command, made),
            Stage(f"verify-{dtype}", ("-m", "icexport", "verify", bundle), made),
            Stage(f"generate-{dtype}", _generate(bundle, control, f"generate-{dtype}"), made),
            Stage(f"low-{dtype}", (*_generate(bundle, control, f"low-{dtype}"), "--low-memory"), made),
            Stage(f"steps-{dtype}", _draw("bundle", bundle, control, f"steps-{dtype}"), made),
        ]
    for dtype in ("fp32", "bf16"):
        name = f"eager-{dtype}"
        command = (*_draw("diffusers", "model", control, name), "--dtype", dtype)
        stages.append(Stage(name, command, ("model/random.json",)))
    bundle = f"bundle-{LARGE}"
    side = (*build_options, "--height", str(LARGE), "--width", str(LARGE))
    drawn = _generate(bundle, f"control-{LARGE}.png", f"generate-{LARGE}")
    return [
        *stages,
        Stage(f"build-{LARGE}", _build("reference", "fp32", bundle, side), makes=bundle),
        Stage(f"generate-{LARGE}", drawn, (f"{bundle}/icexport.json",)),
    ]


def _build(model: str, dtype: str, bundle: str, options: Sequence[str]) -> tuple[str, ...]:
    where = ("--model", model, "--dtype", dtype, "--backend", "onnxruntime", "--output", bundle)
    return ("-m", "icexport", "build", "--cond", "canny", *where, *options)


def _generate(bundle: str, control: str, name: str) -> tuple[str, ...]:
    numbers = ("--steps", str(STEPS), "--guidance-scale", str(GUIDANCE), "--seed", str(SEED))
    where = ("--backend", "onnxruntime", "--device", "cpu", "--output", f"{_RESULTS}/{name}.png")
    return ("-m", "icexport", "generate", bundle, "--prompt", PROMPT, "--control-map", control, *numbers, *where)


def _draw(kind: str, folder: str, control: str, name: str) -> tuple[str, ...]:
    where = ("--control", control, "--result", f"{_RESULTS}/{name}")
    return ("-m", "benchmarks.real_size.draw", kind, folder, *where)


def prepare(folder: Path) -> None:
    """Make the output folder with the control maps that stages draw by: the edges of a ring and a box."""
    (folder / _RESULTS).mkdir(parents=True, exist_ok=True)
    for side in (*SIDES.values(), LARGE):
        picture = Image.new("RGB", (side, side))
        pen, width = ImageDraw.Draw(picture), max(1, side // 128)
        pen.ellipse([side // 8, side // 8, side * 5 // 8, side * 5 // 8], outline="white", width=width)
        pen.rectangle([side // 2, side // 2, side * 7 // 8, side * 7 // 8], outline="white", width=width)
        picture.save(folder / f"control-{side}.png")
