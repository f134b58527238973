"""Results as a table, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EAGER = ("eager-fp32", "eager-bf16")


def derived(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return ratios between stages, as far as both ended well: peaks over diffusers', and speeds against it.

    The peak is that of ``icexport generate``, fidelity included; the speed is that of the steps alone, without it.
    """
    found: dict[str, float] = {}
    for dtype in ("fp32", "fp16"):
        for base in _EAGER:
            pairs = {
                f"peak of generate-{dtype} over {base}": ("peak_bytes", f"generate-{dtype}", base),
                f"anonymous peak of generate-{dtype} over {base}": ("anonymous_peak_bytes", f"generate-{dtype}", base),
                # A speed is the inverse of the time: the baseline is on top.
                f"speed of steps-{dtype} against {base}": ("seconds_per_step", base, f"steps-{dtype}"),
            }
            for title, (key, above, below) in pairs.items():
                values = [stages[name][key] for name in (above, below) if _good(stages, name, key)]
                if len(values) == 2:
                    found[title] = round(values[0] / values[1], 3)
    return found


def _good(stages: Mapping[str, Mapping[str, Any]], name: str, key: str) -> bool:
    stage = stages.get(name, {})
    return stage.get("status") == "ok" and bool(stage.get(key))


def markdown(document: Mapping[str, Any]) -> str:
    """Return a table of all stages, the ratios, and a line on the machine."""
    lines = [
        "| stage | ended | s | s/step | peak GB | of | anonymous GB | longest silence s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, stage in document["stages"].items():
        ended = f"{stage['status']}: {stage['reason']}" if stage["reason"] else stage["status"]
        numbers = [
            _number(stage, "seconds", 1),
            _number(stage, "seconds_per_step", 3),
            _number(stage, "peak_bytes", 2, 1e9),
            str(stage.get("peak_process", "")),
            _number(stage, "anonymous_peak_bytes", 2, 1e9),
            _number(stage, "longest_silence_s", 1),
        ]
        lines.append(f"| {name} | {ended} | {' | '.join(numbers)} |")
    ratios = [f"* {title}: {value:.2f}" for title, value in document["derived"].items()]
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    about = (
        f"Size {document['size']}. Peak: the largest resident size of one process of the stage (VmHWM), mapped files "
        "included; of: whether that was the stage's own process or a child of it. Anonymous: the largest sum of what "
        f"its processes held at one time without mapped files. {machine}."
    )
    return "\n".join([*lines, "", *ratios, *([""] if ratios else []), about]) + "\n"


def _number(stage: Mapping[str, Any], key: str, digits: int, unit: float = 1) -> str:
    return f"{stage[key] / unit:.{digits}f}" if stage.get(key) is not None else ""
