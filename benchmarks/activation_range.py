"""How far the cases of the float16 range pass reach, against many prompts and steps of the reference model.

    python -m benchmarks.activation_range --cond canny

For each graph and each set of cases: the largest ratio of a value's peak over all prompts and steps to its peak in the
set, and the ratio that one value in a hundred exceeds. ``LIMIT`` of ``icexport.builder.mixed`` leaves room for 4. The
last line on stdout is one JSON document. Takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from icexport.builder.mixed import measure
from icexport.export.onnx import export_graph
from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.split import split
from icexport.models.base_model import REFERENCE
from icexport.models.sizes import size_multiple
from icexport.models.source import ModelSource
from icexport.parity.cases import Case, cases
from icexport.parity.real_cases import PROMPT, STEPS, real_cases

PROMPTS = {"a green apple": 10, "a cat": 10, "a blue car on a street": 10, "an old man with a hat": 10, PROMPT: 20}
"""Prompts, and the number of steps that each is drawn in."""
GRAPHS = ("controlnet", "unet", "probe", "vae_decoder")
SIDE = SizeRange(64, 64, 64)
PROFILE = Profile(SizeRange(1, 1, 4), SIDE, SIDE)


def measured(cond: str) -> list[dict[str, Any]]:
    """Return one row for each graph and each set of cases."""
    source = ModelSource.find(cond, REFERENCE)
    graphs = {graph.name: graph for graph in split(source, torch.float32)}

    def drawn(prompt: str, steps: int, *, every_step: bool) -> dict[str, list[Case]]:
        found = real_cases(list(graphs.values()), source, PROFILE, steps=steps, prompt=prompt, every_step=every_step)
        return {name: [one.case for one in expected] for name, expected in found.items()}

    pictures = [drawn(prompt, steps, every_step=True) for prompt, steps in PROMPTS.items()]
    few = {steps: drawn(PROMPT, steps, every_step=False) for steps in (2, 3, STEPS)}
    all_steps = drawn(PROMPT, STEPS, every_step=True)
    multiple, rows = size_multiple(source.config("unet"), source.config("vae")), []
    for name in GRAPHS:
        seeded = list(cases(graphs[name], PROFILE, multiple))
        sets = {f"first and last of {steps}, 1 seeded": [*seeded[:1], *few[steps][name]] for steps in few}
        sets |= {
            f"all of {STEPS}, 3 seeded": [*seeded[:3], *all_steps[name]],
            f"last of {STEPS}, 1 seeded": [*seeded[:1], few[STEPS][name][-1]],
        }
        truth = [case for picture in pictures for case in picture[name]]
        for label, ratios in _ratios(graphs[name], multiple, truth, sets).items():
            row = {"graph": name, "cases": label, "largest": ratios.max(), "one_in_100": np.quantile(ratios, 0.99)}
            rows.append({key: round(float(v), 2) if key in ("largest", "one_in_100") else v for key, v in row.items()})
    return rows


def _ratios(
    graph: Graph, multiple: int, truth: Sequence[Case], sets: dict[str, list[Case]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return, for each set of cases, the ratio of the peaks over ``truth`` to those of the set, for every value."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph.name}.onnx"
        export_graph(graph.cast(torch.float16), path, PROFILE.symbols(multiple))
        model = onnx.load(path, load_external_data=False)
        highest = measure(model, truth, path.parent)
        found = {label: measure(model, case_list, path.parent) for label, case_list in sets.items()}
    return {
        label: np.array([highest[name] / max(peak, 1e-9) for name, peak in peaks.items()])
        for label, peaks in found.items()
    }


def main() -> None:
    """Run the command line of ``python -m benchmarks.activation_range``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cond", default="canny", help="condition of the reference model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    found = measured(args.cond)
    for row in found:
        sys.stderr.write("{graph:12} {cases:28} largest {largest:5.2f}, one in 100: {one_in_100:5.2f}\n".format(**row))
    sys.stdout.write(json.dumps({"cond": args.cond, "rows": found}) + "\n")


if __name__ == "__main__":
    main()
