"""Run the experiment, or what is left of it, and write its report.

    OMP_NUM_THREADS=1 python -m training.experiment --work runs/experiment --processes 2 --machine '2 cores of ...'

Needs the extra ``train`` and nothing else: the base model is the embedded one and the pictures are procedural. A
stopped run goes on where it was, and a report can be written of what is there.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training.experiment.recipe import DEFAULT, Arm, ProbeKind, Recipe
from training.experiment.report import write
from training.experiment.run import RESULT, gradient_norms, judge, probe_rows, real_features, run_arm, save
from training.experiment.setting import Setting
from training.tasks.leak import TIMESTEPS

LEAK_TESTED: tuple[ProbeKind, ...] = ("attn", "conv", "plain")
"""Probes whose leak test, with the ControlNet that the arms start from, is part of the report."""

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, condition: str, work: Path) -> None:
    """Train what the arms of ``condition`` share, and judge where they start and what the prompt alone gives."""
    setting = Setting(recipe, condition, work)
    for kind in sorted({"attn", "held-out", "plain", *(arm.probe for arm in recipe.arms)}):
        setting.probe(kind)
    if not (setting.work / "real" / RESULT).exists():
        save({"features": real_features(setting)}, setting.work / "real")
    for name, controlnet in (("start", setting.fork()), ("prompt-only", None)):
        folder = setting.work / name
        if not (folder / RESULT).exists():
            found = judge(setting, controlnet, folder)
            if controlnet is not None:
                found["gradients"] = gradient_norms(setting)
                found["leak"] = {kind: probe_rows(setting, controlnet, kind, TIMESTEPS) for kind in LEAK_TESTED}
            save(found, folder)


def jobs(recipe: Recipe, work: Path) -> list[tuple[str, Arm, int]]:
    """List what is left to run, as (condition, arm, seed): the arms of the claim with every seed, then the others."""
    ordered = [
        (condition, arm, seed)
        for claimed in (True, False)
        for seed in recipe.seeds
        for arm in recipe.arms
        for condition in recipe.conditions
        if (arm.name in recipe.claim) == claimed
    ]
    return [job for job in ordered if not (work / job[0] / job[1].name / f"seed-{job[2]}" / RESULT).exists()]


def main() -> None:
    """Run the command line of ``python -m training.experiment``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="networks, pictures and results")
    parser.add_argument("--recipe", type=Path, default=DEFAULT)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--docs", type=Path, default=None, help="write experiment.md and its plot into this folder")
    parser.add_argument("--machine", default="an unnamed machine", help="what it ran on, for the report")
    parser.add_argument("--only", nargs=3, metavar=("CONDITION", "ARM", "SEED"), default=None, help="a single run")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe.load(args.recipe)
    if args.only:
        condition, name, seed = args.only
        if name == "prepare":
            prepare(recipe, condition, args.work)
        else:
            run_arm(Setting(recipe, condition, args.work), recipe.arm(name), int(seed))
        return
    if not args.report:
        own = [sys.executable, "-m", "training.experiment", "--work", str(args.work), "--recipe", str(args.recipe)]
        with ThreadPoolExecutor(args.processes) as pool:
            for _ in pool.map(lambda c: _call(own, args.work, c, "prepare", 0), recipe.conditions):
                pass
            for _ in pool.map(lambda job: _call(own, args.work, job[0], job[1].name, job[2]), jobs(recipe, args.work)):
                pass
    if args.docs:
        write(recipe, args.work, args.docs, args.machine)


def _call(own: list[str], work: Path, condition: str, name: str, seed: int) -> None:
    """Run in a process of its own: its memory is freed, and several can run side by side."""
    logger.info("%s %s, seed %d", condition, name, seed)
    log = work / "logs" / f"{condition}-{name}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        command = [*own, "--only", condition, name, str(seed)]
        result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)  # noqa: S603  our own
    if result.returncode:
        raise SystemExit(f"{condition} {name}, seed {seed} failed: see {log}")


if __name__ == "__main__":
    main()
