"""Runs phases one after the other, each in a process of its own with a time limit; what is done is not done again."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT, checkout, sources_hash
from benchmarks.gpu.report import FAILED, NOT_AVAILABLE, OK, RUNNING, SCHEMA, TIMED_OUT, Context, Report, write_json

_LOG_LINES = 40
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Phase:
    """One part of a suite.

    Attributes:
        name: name of the phase and of its result file.
        function: ``module:function``, called as ``function(report, context)``.
        share: part of the time, relative to the phases behind it; they get what it does not use.
    """

    name: str
    function: str
    share: float


def run_suite(
    phases: Sequence[Phase],
    output: Path,
    context: Context,
    *,
    seconds: float,
    only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Run what is not done yet, and merge all results.

    Args:
        phases: the phases, in order.
        output: folder of the results; a phase whose result there is ``ok`` and of the same sources is not run again.
        context: what every phase gets.
        seconds: time for all phases together.
        only: names of the phases to run; an empty list means all.
        progress: called with what begins and how it ended.

    Returns:
        The merged document, as written to ``<gpu>-<date>.json`` in ``output``.
    """
    output.mkdir(parents=True, exist_ok=True)
    context.work.mkdir(parents=True, exist_ok=True)
    about = {"device": context.device, "sources": sources_hash()}
    deadline = time.monotonic() + seconds
    wanted = [phase for phase in phases if not only or phase.name in only]
    for index, phase in enumerate(wanted):
        path = output / f"{phase.name}.json"
        if done(path, about):
            progress(f"{phase.name}: done before")
            continue
        shares = sum(later.share for later in wanted[index:])
        limit = (deadline - time.monotonic()) * phase.share / shares
        progress(f"{phase.name}: up to {max(limit, 0):.0f} s")
        result = run_phase(phase, path, context, about, limit)
        progress(
            f"{phase.name}: {result['status']} after {result['seconds']:.0f} s {result['error'].strip()}".rstrip()
        )
    return merge(phases, output, about)


def done(path: Path, about: dict[str, Any]) -> bool:
    """Tell whether a phase needs no other run: it went well, on the same device, with the same sources."""
    result = _read(path)
    return result.get("status") == OK and all(result.get(name) == value for name, value in about.items())


def run_phase(phase: Phase, path: Path, context: Context, about: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run one phase in a process of its own and return its result, which is also in ``path``.

    The items that a phase finished before it crashed or ran out of time stay in the result.
    """
    started, stamp = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {**about, "phase": phase.name, "started": stamp}
    Report(path, about)  # what lies there from before is not this run's
    log = context.work / f"{phase.name}.log"
    code: int | None = None
    if limit >= _LEAST_SECONDS:
        code = _spawn(phase, path, context, log, limit, about)
    else:
        log.write_text("", encoding="utf-8")
    result = _read(path)
    result |= {"seconds": round(time.monotonic() - started, 1), "limit": round(limit, 1)}
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code is None:
        result["status"], result["error"] = (
            TIMED_OUT,
            f"stopped after {limit:.0f} s: its share of the time was used up",
        )
    elif code != 0 or result["status"] == RUNNING:
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        result["status"], result["error"] = (
            FAILED,
            f"the process ended with {what}: {text[-1] if text else 'no output'}",
        )
    result["log"] = [] if result["status"] == OK else text[-_LOG_LINES:]
    write_json(path, result)
    return result


def _spawn(phase: Phase, path: Path, context: Context, log: Path, limit: float, about: dict[str, Any]) -> int | None:
    """Return the exit code of the phase's process, or None if it had to be stopped."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.suite",
        phase.function,
        str(path),
        context.device,
        str(context.work),
    ]
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603  this interpreter and this module
            [*command, json.dumps(about)], stdout=sink, stderr=sink, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
                process.wait()


def merge(phases: Sequence[Phase], output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return one document of all results, written to ``<gpu>-<date>.json``."""
    results = {phase.name: found for phase in phases if (found := _read(output / f"{phase.name}.json"))}
    machine = results.get("environment", {}).get("items", [])
    values = {name: value for item in machine for name, value in item["values"].items()}
    gpu = str(values.get("gpu") or about["device"])
    started = min(result["started"] for result in results.values())
    commit, dirty = checkout()
    goals = {
        f"{name}: {item['name']}: {what}": goal
        for name, result in results.items()
        for item in result["items"]
        for what, goal in item["goals"].items()
    }
    good = all(result["status"] in (OK, NOT_AVAILABLE) for result in results.values())
    merged = {
        "schema": SCHEMA,
        **about,
        "gpu": gpu,
        "driver": values.get("driver"),
        "versions": values.get("versions"),
        "commit": commit,
        "dirty": dirty,
        "started": started,
        "status": OK if good else FAILED,
        "goals": goals,
        "phases": results,
    }
    for path in output.glob("*.json"):
        if "phases" in _read(path):  # of an earlier start, perhaps of another day
            path.unlink()
    slug = "".join(c if c.isalnum() else "-" for c in gpu.lower())
    write_json(output / f"{slug}-{started[:10]}.json", merged)
    return merged


def _read(path: Path) -> dict[str, Any]:
    """Return a result; empty if there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else {}


def main() -> None:
    """Run one phase in this process: ``module:function RESULT DEVICE WORK ABOUT``."""
    parser = argparse.ArgumentParser()
    for name in ("function", "result", "device", "work", "about"):
        parser.add_argument(name)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    module, _, function = args.function.partition(":")
    report = Report(Path(args.result), json.loads(args.about))
    getattr(importlib.import_module(module), function)(report, Context(args.device, Path(args.work)))
    report.finish()


if __name__ == "__main__":
    main()
