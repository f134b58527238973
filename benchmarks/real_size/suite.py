"""Runs stages one after the other and keeps what they took in one JSON file, complete after every stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT
from benchmarks.real_size.report import derived, markdown
from benchmarks.real_size.stages import Stage, prepare
from benchmarks.real_size.watch import Watched, watch
from icexport.host.files import write_whole
from icexport.host.versions import versions

SCHEMA = 1
OK, FAILED, KILLED, SKIPPED = "ok", "failed", "killed", "skipped"
_STEP = re.compile(r"^\[ *\d+/\d+\] (.*\S) +(\d+\.\d) s$", re.MULTILINE)
_MACHINE = """
import json
from icexport.host.speed import convolution_rate
from icexport.host.versions import machine
print(json.dumps(machine() | {"convolutions": f"{convolution_rate() / 1e9:.0f} GFLOP/s"}))
"""


class OtherResultsError(Exception):
    """The output folder holds results that do not belong with new ones."""


def run(
    stages: Sequence[Stage],
    folder: Path,
    *,
    size: str,
    limit: int,
    name: str = "real-size",
    resume: bool = False,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Run stages and return the whole document, which is in ``<name>.json``, and as a table in ``<name>.md``.

    Results of other stages that are in the folder stay.

    Args:
        stages: stages to run, in order.
        folder: output folder.
        size: name of the model's size.
        limit: most resident bytes of a stage's processes together; a stage that passes it is killed.
        name: name of the results.
        resume: keep the results that are there, however the stage ended; what was skipped has none.
        tell: called with what begins and how it ended.

    Raises:
        OtherResultsError: the folder holds results for another size, or a file of another kind.
    """
    folder = folder.resolve()
    prepare(folder)
    document = _read(folder / f"{name}.json", size)
    document |= {"machine": _machine(), "versions": versions(), "memory_limit_bytes": limit}
    found: dict[str, Any] = document["stages"]
    for stage in stages:
        if resume and found.get(stage.name, {}).get("status", SKIPPED) != SKIPPED:
            tell(f"{stage.name}: done before")
            continue
        tell(f"{stage.name} ...")
        machine = document["machine"]
        result = found[stage.name] = measure(stage, folder, limit, machine) | {"commit": machine.get("commit")}
        document["derived"] = derived(found)
        write_whole(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
        write_whole(folder / f"{name}.md", markdown(document))
        tell(f"{stage.name}: {result['status']} {result['reason']}".rstrip())
    return document


def measure(stage: Stage, folder: Path, limit: int, machine: Mapping[str, str]) -> dict[str, Any]:
    """Run one stage on a machine that can, and return its result."""
    command = ["python", *stage.arguments]
    result: dict[str, Any] = {"status": SKIPPED, "reason": "", "command": command, "exit_code": None}
    missing = [path for path in stage.needs if not (folder / path).exists()]
    if missing:
        return result | {"reason": f"{', '.join(missing)} is not there"}
    if stage.instructions not in ("", machine.get("instructions")):
        return result | {"reason": f"this CPU has no {stage.instructions}"}
    if stage.makes:
        shutil.rmtree(folder / stage.makes, ignore_errors=True)
    (folder / stage.file(".json")).unlink(missing_ok=True)
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    log = folder / stage.file(".log")
    seen = watch([sys.executable, *stage.arguments], folder, log, _environment(folder), limit)
    if stage.removes:
        shutil.rmtree(folder / stage.removes)
    status, reason = _verdict(seen, limit)
    result |= {
        "status": status,
        "reason": reason,
        "exit_code": seen.exit_code,
        "started": stamp,
        "seconds": seen.seconds,
        "peak_bytes": seen.peak,
        "peak_process": "child" if seen.child_peak > seen.own_peak else "stage",
        "child_peak_bytes": seen.child_peak,
        "resident_peak_bytes": seen.resident_peak,
        "anonymous_peak_bytes": seen.anonymous_peak,
        "peak_line": seen.peak_line,
        "longest_silence_s": seen.longest_silence,
        "parts": parts(log.read_text(encoding="utf-8", errors="replace")),
        "last_lines": list(seen.last_lines),
    }
    told = folder / stage.file(".json")
    return result | (json.loads(told.read_text(encoding="utf-8")) if told.exists() else {})


def parts(log: str) -> dict[str, float]:
    """Return the steps that ``icexport`` told of in a log, and the seconds of each."""
    return {name: float(seconds) for name, seconds in _STEP.findall(log)}


def _verdict(seen: Watched, limit: int) -> tuple[str, str]:
    """Return how a stage ended, and why."""
    if seen.over_limit:
        return KILLED, f"its processes passed {limit / 1e9:.1f} GB"
    if seen.exit_code < 0:
        return KILLED, f"signal {signal.Signals(-seen.exit_code).name}"
    return (FAILED, f"exit code {seen.exit_code}") if seen.exit_code else (OK, "")


def _environment(folder: Path) -> Mapping[str, str]:
    """Return what stages run in: the sources of this checkout, and a store of engines that is not the user's."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "ICEXPORT_CACHE": str(folder / "cache")}
    return {**os.environ, **own}


def _machine() -> dict[str, str]:
    """Describe the machine, in another process: torch would make this one larger than what it measures."""
    command = [sys.executable, "-c", _MACHINE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603  fixed arguments
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _read(path: Path, size: str) -> dict[str, Any]:
    """Return the results that are there, or none."""
    if not path.exists():
        return {"schema": SCHEMA, "size": size, "machine": {}, "versions": {}, "stages": {}, "derived": {}}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        there = (document["schema"], document["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise OtherResultsError(f"{path} holds no results: {error!r}. Choose another --output.") from error
    if there != (SCHEMA, size):
        raise OtherResultsError(f"{path} has results of size {there[1]}, not {size}. Choose another --output.")
    return document
