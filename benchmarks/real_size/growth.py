"""How builds and pictures grow: a table and a plot of what ``benchmarks.real_size --growth`` measured.

    python -m benchmarks.real_size.growth DIR/growth.json --output FOLDER

Writes growth.md and growth.png. Beside each measured peak stands what ``icexport`` expects before the work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from matplotlib.figure import Figure

from benchmarks.real_size.stages import STEPS_OF_GROWTH, growth_points
from benchmarks.sd15 import sd15_text_encoder, sd15_unet, sd15_vae
from icexport.backends.table import get
from icexport.builder.duration import Work, seconds_needed
from icexport.builder.preflight import gate_needs
from icexport.graphs.profile import Profile, SizeRange
from icexport.host.files import write_whole
from icexport.models.precision import precision
from icexport.runtime.needs import Needs
from icexport.runtime.phases import PHASES

WEIGHTS = {
    "text_encoder": 122_977_540,
    "controlnet": 361_268_403,
    "unet": 859_465_451,
    "probe": 5_891_108,
    "vae": 49_468_956,
}
"""Weights in the graphs of each part of Stable Diffusion 1.5."""
LIBRARIES = 0.45e9
"""What a process that draws holds before it opens a bundle."""


def configs() -> dict[str, dict[str, Any]]:
    """Return the configs of Stable Diffusion 1.5's parts."""
    with torch.device("meta"):
        unet = sd15_unet()
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        parts = {"unet": unet, "vae": sd15_vae(), "controlnet": controlnet}
        text = sd15_text_encoder().config
    return {name: dict(part.config) for name, part in parts.items()} | {"text_encoder": text.to_dict()}


@dataclass(frozen=True)
class Point:
    """One size; times in seconds, memory in bytes without mapped files.

    Attributes:
        side: height and width in pixels.
        pictures: pictures in one call.
        build_seconds: of the build, its gate included.
        build_seconds_expected: what the preflight expects.
        build_peak: its peak.
        build_expected: what the preflight expects.
        step_seconds: of one guided step.
        decode_seconds: of decoding and scoring all pictures.
        peak: peak of drawing them.
        expected: what the preflight expects.
    """

    side: int
    pictures: int
    build_seconds: float
    build_seconds_expected: float
    build_peak: float
    build_expected: float
    step_seconds: float
    decode_seconds: float
    peak: float
    expected: float


def points(document: Mapping[str, Any]) -> list[Point]:
    """Return the sizes whose two stages ended well."""
    footprint, found, stages = get("onnxruntime").footprint, [], document["stages"]
    if footprint is None:
        raise ValueError("The footprint of ONNX Runtime is not known.")
    phases = dict.fromkeys(PHASES.values(), 0.0)
    for name, count in WEIGHTS.items():
        phases[PHASES.get(name, "decode")] += footprint.weight["fp32"] * count
    sd15 = configs()
    needs = Needs(phases, *footprint.per_pixel(sd15))
    rate = float(document["machine"]["convolutions"].split()[0]) * 1e9
    for side, pictures in growth_points("sd15"):
        name = f"{side}x{pictures}"
        build, drawn = (stages.get(f"{kind}-{name}", {}) for kind in ("build", "generate"))
        if not build.get("status") == drawn.get("status") == "ok":
            continue
        fixed = SizeRange.parse(side)
        profile = Profile(SizeRange.parse(pictures), fixed, fixed)
        found.append(
            Point(
                side,
                pictures,
                build["seconds"],
                seconds_needed(Work.of(sd15, profile), WEIGHTS, precision("fp32"), rate),
                build["anonymous_peak_bytes"],
                gate_needs(WEIGHTS, sd15, profile, footprint, "fp32"),
                drawn["parts"]["draw"] / STEPS_OF_GROWTH,
                drawn["parts"]["decode and score"],
                drawn["anonymous_peak_bytes"],
                LIBRARIES + needs.needed(side, side, pictures),
            )
        )
    return found


def table(found: list[Point]) -> str:
    """Return the points as a Markdown table."""
    lines = [
        "| px | pictures | build s | expected | build GB | expected | s/step | decode s | draw GB | expected |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {point.side} | {point.pictures} | {point.build_seconds:.0f} | "
        f"{point.build_seconds_expected:.0f} | {point.build_peak / 1e9:.2f} | "
        f"{point.build_expected / 1e9:.2f} | {point.step_seconds:.1f} | {point.decode_seconds:.1f} | "
        f"{point.peak / 1e9:.2f} | {point.expected / 1e9:.2f} |"
        for point in found
    ]
    return "\n".join(lines) + "\n"


def plot(found: list[Point], path: Path) -> None:
    """Draw memory and time over the pixels of a call."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = sorted(found, key=lambda point: point.side**2 * point.pictures)
    pixels = [point.side**2 * point.pictures / 1e6 for point in rows]
    for name, colour, measured, expected in (
        ("build", "tab:blue", "build_peak", "build_expected"),
        ("draw", "tab:orange", "peak", "expected"),
    ):
        left.plot(pixels, [getattr(point, measured) / 1e9 for point in rows], "o", color=colour, label=name)
        left.plot(
            pixels, [getattr(point, expected) / 1e9 for point in rows], "-", color=colour, label=f"{name}, expected"
        )
    for one in (True, False):
        some = [point for point in rows if (point.pictures == 1) == one]
        if not some:
            continue
        label = "one picture" if one else "several, 512 px"
        right.plot(
            [point.side**2 * point.pictures / 1e6 for point in some],
            [point.step_seconds for point in some],
            "o-",
            label=label,
        )
    left.set(xlabel="megapixels in a call", ylabel="GB", ylim=(0, None), title="Peak memory")
    right.set(xlabel="megapixels in a call", ylabel="s", ylim=(0, None), title="One guided step")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line of ``python -m benchmarks.real_size.growth``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="growth.json")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of growth.md and growth.png"
    )
    args = parser.parse_args()
    found = points(json.loads(args.results.read_text(encoding="utf-8")))
    write_whole(args.output / "growth.md", table(found))
    plot(found, args.output / "growth.png")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
