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

STEPS_OF_GROWTH = 2

_RESULTS = "stages"


@dataclass(frozen=True)
class Stage:
    """One process to measure.

    Attributes:
        name: name of the stage, and of its files in ``stages``.
        arguments: what Python gets; paths are relative to the output folder.
        needs: paths that have to be there.
        makes: folder that is removed before, so that the stage makes it; empty: none.
        removes: folder that is removed afterwards; empty: none.
        instructions: what torch has to compute with, as ``AVX512``; empty: anything.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    makes: str = ""
    removes: str = ""
    instructions: str = ""

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
    for dtype, instructions in (("fp32", ""), ("bf16", "AVX512")):  # without them, bf16 takes hours
        name = f"eager-{dtype}"
        command = (*_draw("diffusers", "model", control, name), "--dtype", dtype)
        stages.append(Stage(name, command, ("model/random.json",), instructions=instructions))
    bundle = f"bundle-{LARGE}"
    side = (*build_options, "--height", str(LARGE), "--width", str(LARGE))
    drawn = _generate(bundle, f"control-{LARGE}.png", f"generate-{LARGE}")
    return [
        *stages,
        Stage(f"build-{LARGE}", _build("reference", "fp32", bundle, side), makes=bundle),
        Stage(f"generate-{LARGE}", drawn, (f"{bundle}/icexport.json",)),
    ]


def growth_stages(size: str, build_options: Sequence[str] = ()) -> list[Stage]:
    """Return the stages that show how builds and pictures grow with sides, batch and threads; see ``all_stages``."""
    stages = [Stage("model", ("-m", "benchmarks.real_size.model", "model", "--size", size))]
    for side, batch in growth_points(size):
        name = f"{side}x{batch}"
        bundle = f"bundle-{name}"
        shape = ("--height", str(side), "--width", str(side), "--batch-size", str(batch))
        build = _build("model", "fp32", bundle, (*build_options, *shape))
        drawn = _generate(bundle, f"control-{side}.png", f"generate-{name}", steps=STEPS_OF_GROWTH, pictures=batch)[2:]
        made = (f"{bundle}/icexport.json",)
        stages.append(Stage(f"build-{name}", build, ("model/random.json",), bundle))
        if (side, batch) == (SIDES[size], 1):
            pinned = ("-m", "benchmarks.real_size.pinned", "1", "icexport")
            stages.append(Stage(f"generate-{name}-1-thread", (*pinned, *drawn), made))
        stages.append(Stage(f"generate-{name}", ("-m", "icexport", *drawn), made, removes=bundle))
    return stages


def growth_points(size: str) -> list[tuple[int, int]]:
    """Return sides in pixels and batches: up to twice the model's own side, and its own side with more pictures."""
    sides = [SIDES[size] * eighths // 8 for eighths in (8, 10, 12, 16)]
    return [*((side, 1) for side in sides), (SIDES[size], 2), (SIDES[size], 4)]


def _build(model: str, dtype: str, bundle: str, options: Sequence[str]) -> tuple[str, ...]:
    where = ("--model", model, "--dtype", dtype, "--backend", "onnxruntime", "--output", bundle)
    return ("-m", "icexport", "build", "--cond", "canny", *where, *options)


def _generate(bundle: str, control: str, name: str, steps: int = STEPS, pictures: int = 1) -> tuple[str, ...]:
    numbers = ("--steps", str(steps), "--guidance-scale", str(GUIDANCE), "--seed", str(SEED))
    several = ("--num-images", str(pictures)) if pictures > 1 else ()
    where = ("--backend", "onnxruntime", "--device", "cpu", "--output", f"{_RESULTS}/{name}.png")
    what = ("--prompt", PROMPT, "--control-map", control)
    return ("-m", "icexport", "generate", bundle, *what, *numbers, *several, *where)


def _draw(kind: str, folder: str, control: str, name: str) -> tuple[str, ...]:
    where = ("--control", control, "--result", f"{_RESULTS}/{name}")
    return ("-m", "benchmarks.real_size.draw", kind, folder, *where)


def prepare(folder: Path) -> None:
    """Make the output folder with the control maps that stages draw by: the edges of a ring and a box."""
    (folder / _RESULTS).mkdir(parents=True, exist_ok=True)
    for side in {side for size in SIDES for side, _ in growth_points(size)}:
        picture = Image.new("RGB", (side, side))
        pen, width = ImageDraw.Draw(picture), max(1, side // 128)
        pen.ellipse([side // 8, side // 8, side * 5 // 8, side * 5 // 8], outline="white", width=width)
        pen.rectangle([side // 2, side // 2, side * 7 // 8, side * 7 // 8], outline="white", width=width)
        picture.save(folder / f"control-{side}.png")
