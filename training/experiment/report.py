"""The experiment's report: tables, a plot, and the differences to plain fine-tuning with their intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.evaluation.features import kernel_distance
from training.evaluation.intervals import paired_bootstrap
from training.experiment.recipe import Recipe
from training.experiment.run import RESULT

BASELINE = "finetune"


@dataclass(frozen=True)
class Measure:
    """A number that is compared.

    Attributes:
        key: name of the number in ``result.json``.
        title: name of the number for people.
        better: 1 where more is better, -1 where less is.
    """

    key: str
    title: str
    better: int


PRIMARY = {
    "canny": Measure("trained_metric", "edge F1 (1 px)", 1),
    "depth": Measure("judge_rmse", "depth RMSE, judge network (0-255)", -1),
}
SECONDARY = {
    "canny": Measure("judge_rmse", "edge RMSE, judge network (0-255)", -1),
    "depth": Measure("trained_metric", "depth RMSE, reward network (0-255)", -1),
}


@dataclass(frozen=True)
class Row:
    """What the runs of one arm say.

    Attributes:
        arm: name of the arm.
        seeds: seeds that were run.
        mean: mean of the measure over seeds and held-out conditions.
        difference: difference to the baseline's runs of the same seeds, with a 95 % interval over conditions; positive
            is better. None for the baseline, and where no seed is shared.
        by_seed: the difference for each seed.
        result: result of every seed.
    """

    arm: str
    seeds: tuple[int, ...]
    mean: float
    difference: tuple[float, float, float] | None
    by_seed: tuple[float, ...]
    results: tuple[dict[str, Any], ...]


def rows(recipe: Recipe, work: Path, condition: str, measure: Measure) -> list[Row]:
    """Return one row for every arm that was run, in the recipe's order."""
    runs = {arm.name: _results(recipe, work / condition / arm.name) for arm in recipe.arms}
    base = runs[BASELINE]
    found = []
    for name, results in runs.items():
        if not results:
            continue
        shared = [seed for seed in results if seed in base and name != BASELINE]
        difference, by_seed = None, []
        if shared:
            ours, theirs = (
                torch.stack([torch.tensor(source[seed][measure.key]) for seed in shared]) for source in (results, base)
            )
            by_seed = (measure.better * (ours - theirs).mean(1)).tolist()
            difference = paired_bootstrap(measure.better * ours.mean(0), measure.better * theirs.mean(0))
        mean = float(torch.tensor([result[measure.key] for result in results.values()]).mean())
        found.append(Row(name, tuple(results), mean, difference, tuple(by_seed), tuple(results.values())))
    return found


def write(recipe: Recipe, work: Path, docs: Path, machine: str) -> None:
    """Write ``experiment.json`` and ``images/experiment.png`` into ``docs``, and print the tables' text."""
    summary: dict[str, Any] = {"machine": machine, "conditions": {}}
    for condition in recipe.conditions:
        summary["conditions"][condition] = _summary(recipe, work, condition)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "images").mkdir(exist_ok=True)
    (docs / "experiment.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    tables = "\n".join(
        f"{table(recipe, work, name)}\n{leak_table(_read(work / name / 'start'))}" for name in recipe.conditions
    )
    _insert(docs / "experiment.md", tables + f"\nRun on {machine}.\n")
    plot(recipe, work, docs / "images" / "experiment.png")


def table(recipe: Recipe, work: Path, condition: str) -> str:
    """Return the results of one condition in Markdown."""
    primary, secondary = PRIMARY[condition], SECONDARY[condition]
    lines = [
        f"### {condition}",
        "",
        f"| arm | seeds | {primary.title} | better than {BASELINE} by [95 %] | each seed | {secondary.title} | "
        "probe | held-out probe | feature distance, 1e-4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    others = {row.arm: row for row in rows(recipe, work, condition, secondary)}
    real = torch.tensor(_read(work / condition / "real")["features"])
    for name in ("prompt-only", "start"):
        result = _read(work / condition / name)
        values = [float(torch.tensor(result[measure.key]).mean()) for measure in (primary, secondary)]
        probes = [_probe(result, kind) for kind in ("attn", "held-out")]
        lines.append(
            f"| {name} | | {_number(values[0])} | | | {_number(values[1])} | {' | '.join(probes)} | "
            f"{1e4 * _distance([result], real):.1f} |"
        )
    for row in rows(recipe, work, condition, primary):
        gain = "" if row.difference is None else "{:+.4g} [{:+.4g}, {:+.4g}]".format(*row.difference)
        seeds = ", ".join(f"{value:+.3g}" for value in row.by_seed)
        probes = [
            f"{sum(_matched(result, kind) for result in row.results) / len(row.results):.4f}"
            for kind in ("attn", "held-out")
        ]
        lines.append(
            f"| {row.arm} | {len(row.seeds)} | {_number(row.mean)} | {gain} | {seeds} | "
            f"{_number(others[row.arm].mean)} | {' | '.join(probes)} | {1e4 * _distance(row.results, real):.1f} |"
        )
    return "\n".join(lines) + "\n"


def leak_table(start: dict[str, Any]) -> str:
    """Tell how hard each loss pulls where the arms start, and what each probe reads of another picture's map."""
    norms = ", ".join(f"{name} {value:.4g}" for name, value in start["gradients"].items())
    lines = [
        f"Gradient norms at the start, each loss with weight 1: {norms}.",
        "",
        "Leak test at the start: latents of one picture, control map of another; the reading's error to either map.",
        "",
        "| timestep | "
        + " | ".join(f"{kind}: to the picture | {kind}: to the control" for kind in start["leak"])
        + " |",
        "|---" * (1 + 2 * len(start["leak"])) + "|",
    ]
    for pair in zip(*start["leak"].values(), strict=True):
        errors = " | ".join(f"{row['to_picture']:.4f} | {row['to_control']:.4f}" for row in pair)
        lines.append(f"| {int(pair[0]['timestep'])} | {errors} |")
    return "\n".join(lines) + "\n"


def plot(recipe: Recipe, work: Path, path: Path) -> None:
    """Plot each arm's gain over plain fine-tuning: the mean with its interval, and a dot for each seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(recipe.conditions), figsize=(5.4 * len(recipe.conditions), 3.6), squeeze=False)
    for axis, condition in zip(axes[0], recipe.conditions, strict=True):
        measure = PRIMARY[condition]
        found = [row for row in rows(recipe, work, condition, measure) if row.difference is not None]
        for y, row in enumerate(reversed(found)):
            mean, low, high = row.difference or (0.0, 0.0, 0.0)
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="#1f5fa8", capsize=4)
            axis.plot(row.by_seed, [y + 0.22] * len(row.by_seed), ".", color="#d08020", markersize=5)
        axis.axvline(0, color="#666666", linewidth=1)
        axis.set_yticks(range(len(found)), [row.arm for row in reversed(found)])
        axis.set(title=condition, xlabel=f"better than {BASELINE} by: {measure.title}")
        axis.set_ylim(-0.6, len(found) - 0.2)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _summary(recipe: Recipe, work: Path, condition: str) -> dict[str, Any]:
    """Return everything that the tables say and the leak tests, for machines."""
    start = _read(work / condition / "start")
    found = {}
    for measure in (PRIMARY[condition], SECONDARY[condition]):
        found[measure.key] = [
            {"arm": r.arm, "seeds": r.seeds, "mean": r.mean, "difference": r.difference, "by_seed": r.by_seed}
            for r in rows(recipe, work, condition, measure)
        ]
    leaks = {
        arm.name: {
            str(seed): result["probes"] for seed, result in _results(recipe, work / condition / arm.name).items()
        }
        for arm in recipe.arms
    }
    kept = {name: start[name] for name in ("gradients", "leak")}
    return {"measures": found, "start": kept, "probes": {"start": start["probes"], **leaks}}


def _results(recipe: Recipe, folder: Path) -> dict[int, dict[str, Any]]:
    """Return by seed what was run of an arm."""
    folders = {seed: folder / f"seed-{seed}" for seed in recipe.seeds}
    return {seed: _read(path) for seed, path in folders.items() if (path / RESULT).exists()}


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return found


def _matched(result: dict[str, Any], kind: str) -> float:
    """Return the mean over timesteps of a probe's error with the right control map."""
    errors = [row["matched"] for row in result["probes"][kind]]
    return sum(errors) / len(errors)


def _probe(result: dict[str, Any], kind: str) -> str:
    return f"{_matched(result, kind):.4f}" if "probes" in result else ""


def _distance(results: Sequence[dict[str, Any]], real: Tensor) -> float:
    """Return the kernel distance of the judge's features to those of training pictures, mean over runs."""
    found = [kernel_distance(torch.tensor(result["features"]), real) for result in results]
    return sum(found) / len(found)


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def _insert(path: Path, text: str) -> None:
    """Put ``text`` between the markers of the document, which is otherwise written by people."""
    begin, end = "<!-- tables: python -m training.experiment --report -->\n", "<!-- end of tables -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else f"# The experiment\n\n{begin}{end}\n"
    head, tail = whole[: whole.index(begin) + len(begin)], whole[whole.index(end) :]
    path.write_text(head + text + tail, encoding="utf-8")
