"""Change the sources in one place at a time, and see whether the tests notice: a random draw of such mutants.

The draw is from all mutants of all rooms, so that a file counts as much as there is to change in it; the same seed and
sources give the same. The tests run in copies of the repository, never in the checkout. A run that was stopped goes on
from its report, and so does one with a larger count. `make mutants` runs it.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tomllib

from tests.mutation.mutants import find

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "tests/mutation/settings.toml").read_text(encoding="utf-8"))
ROOMS: dict[str, list[str]] = SETTINGS["rooms"]
MEMORY = 16 * 2**30
KILLED, SURVIVED, TIMED_OUT, NOT_VIABLE = "killed", "survived", "timed out", "not viable"
_OUTCOMES = {0: SURVIVED, 1: KILLED}  # of pytest's exit codes; the others say that it could not run

_running: set[subprocess.Popen[str]] = set()


def draw(seed: int) -> Iterator[dict[str, Any]]:
    """All mutants in random order: room, file, line, diff, code."""
    files = [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) or [ROOT / room]]
    every = [(room, path, mutant) for room, path in files for mutant in find(path.read_text(encoding="utf-8"))]
    random.Random(seed).shuffle(every)  # noqa: S311
    seen = set()
    for room, path, mutant in every:
        code, name = mutant.code(), str(path.relative_to(ROOT))
        if code is not None and (name, code) not in seen:  # two operators may make the same change
            seen.add((name, code))
            before = path.read_text(encoding="utf-8").splitlines()
            diff = list(difflib.unified_diff(before, code.splitlines(), name, name, n=1, lineterm=""))
            yield {"room": room, "file": name, "line": mutant.line, "diff": diff, "code": code}


def sources() -> str:
    """Hash of the rooms and of all tests: a report is of one state of both."""
    paths = [path for name in (*ROOMS, "tests") for path in [ROOT / name, *sorted((ROOT / name).rglob("*.py"))]]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.is_file())).hexdigest()[:16]


def copy_repository(folder: Path) -> None:
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.strip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def run_tests(python: Path, copy: Path, tests: list[str], limit: float | None) -> dict[str, Any]:
    """Outcome, seconds, and the first test that failed."""
    environment = os.environ | {
        "ICEXPORT_TENSORRT_WHEELS": str(ROOT / ".cache/tensorrt-bindings"),
        "ICEXPORT_TEST_EXPORTS": str(copy.with_name("exports")),  # no room that is changed has a part in them
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a file that changes twice in a second would be taken for the same
        "PYTHONPATH": str(copy),
    }
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"--basetemp={copy}-temporary"]
    started = time.monotonic()
    process = subprocess.Popen(
        [python, "-m", "pytest", *options, *tests],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _running.add(process)
    try:
        output, _ = process.communicate(timeout=limit)
        outcome = _OUTCOMES.get(process.returncode, NOT_VIABLE)
    except subprocess.TimeoutExpired:
        output, outcome = "", TIMED_OUT
    finally:
        kill(process)
        _running.discard(process)
    by = re.search(r"^(?:FAILED|ERROR) (.*)", output, re.MULTILINE)
    seconds = round(time.monotonic() - started, 1)
    return {"outcome": outcome, "seconds": seconds, "by": by[1] if by else "", "output": output}


def kill(process: subprocess.Popen[str]) -> None:
    """End the tests and whatever they have started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


class Judge:
    """Runs the tests of a mutant in a copy that is free.

    Args:
        python: Interpreter with the packages of the tests.
        folder: For the copies.
        workers: Number of copies.
        seconds: What the tests of each room take without a mutant.
    """

    def __init__(self, python: Path, folder: Path, workers: int, seconds: dict[str, float]) -> None:
        self._python, self._seconds = python, seconds
        self._copies: queue.Queue[Path] = queue.Queue()
        (folder / "exports").mkdir()
        for index in range(workers):
            copy_repository(folder / f"copy-{index}")
            self._copies.put(folder / f"copy-{index}")

    def baseline(self, room: str) -> dict[str, Any]:
        """Seconds of a room's tests on the sources as they are; SystemExit if these fail."""
        copy = self._copies.get()
        found = run_tests(self._python, copy, ROOMS[room], None)
        self._copies.put(copy)
        if found["outcome"] != SURVIVED:
            raise SystemExit(f"The tests of {room} fail on the sources as they are:\n{found['output']}")
        self._seconds[room] = found["seconds"]
        return {"baseline": room, "seconds": found["seconds"]}

    def __call__(self, mutant: dict[str, Any]) -> dict[str, Any]:
        """The mutant with its outcome, without its code."""
        copy = self._copies.get()
        path = copy / mutant["file"]
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant["code"], encoding="utf-8")
        limit = SETTINGS["timeout_factor"] * self._seconds[mutant["room"]] + SETTINGS["timeout_extra"]
        try:
            found = run_tests(self._python, copy, ROOMS[mutant["room"]], limit)
        finally:
            path.write_text(original, encoding="utf-8")
            self._copies.put(copy)
        return {key: value for key, value in (mutant | found).items() if key not in ("code", "output")}


def summary(lines: list[dict[str, Any]]) -> str:
    """Counts for each room, and the mutants that no test noticed."""
    judged = [line for line in lines if "outcome" in line]
    text = ["| room | killed | survived | timed out | not viable |", "|---|---|---|---|---|"]
    for room in [*ROOMS, "all"]:
        counts = Counter(line["outcome"] for line in judged if room in (line["room"], "all"))
        cells = (str(counts[outcome]) for outcome in (KILLED, SURVIVED, TIMED_OUT, NOT_VIABLE))
        text.append(f"| {room} | {' | '.join(cells)} |")
    seconds = sum(line["seconds"] for line in judged) / max(1, len(judged))
    text.append(f"\nSeed {lines[0]['seed']}, sources {lines[0]['sources']}, {seconds:.0f} s for each mutant.")
    for line in judged:
        if line["outcome"] == SURVIVED:
            text += ["", f"{line['file']}:{line['line']}", "", "```diff", *line["diff"][2:], "```"]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="interpreter with the packages of the tests")
    parser.add_argument("--report", type=Path, default=ROOT / ".cache/mutants/report.jsonl")
    for name in ("seed", "count", "workers"):
        parser.add_argument(f"--{name}", type=int, default=SETTINGS[name], help="[default: %(default)s]")
    args = parser.parse_args()
    header = {"seed": args.seed, "sources": sources()}
    args.report.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.report.read_text().splitlines()] if args.report.exists() else [header]
    if lines[0] != header:
        parser.error(f"{args.report} has {lines[0]}, this is {header}; move it away, or give another --report")
    drawn = [mutant for mutant, _ in zip(draw(args.seed), range(args.count), strict=False)]
    done = {json.dumps([line["file"], line["diff"]]) for line in lines if "outcome" in line}
    waiting = [mutant for mutant in drawn if json.dumps([mutant["file"], mutant["diff"]]) not in done]

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # for the tests, too: a mutant may ask for anything
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells ignore it for all below
    pool = ThreadPoolExecutor(args.workers)
    with tempfile.TemporaryDirectory() as folder, args.report.open("a") as report:

        def keep(line: dict[str, Any]) -> None:
            report.write(json.dumps(line) + "\n")
            report.flush()

        try:
            if report.tell() == 0:
                keep(header)
            seconds = {line["baseline"]: line["seconds"] for line in lines if "baseline" in line}
            judge = Judge(args.python.absolute(), Path(folder), args.workers, seconds)
            rooms = dict.fromkeys(mutant["room"] for mutant in waiting if mutant["room"] not in seconds)
            for task, items in ((judge.baseline, list(rooms)), (judge, waiting)):
                for future in as_completed([pool.submit(task, item) for item in items]):
                    line = future.result()
                    lines.append(line)
                    keep(line)
                    print(*(value for key, value in line.items() if key != "diff"), flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                kill(process)
            pool.shutdown()
    text = summary(lines)
    args.report.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
