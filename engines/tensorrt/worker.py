"""Build a plan in a process of its own: a crash of the builder, or the end of memory, becomes an error.

``python -m engines.tensorrt.worker`` reads a request as JSON from stdin and writes one JSON document a line to stdout:
``{"progress": [what, fraction]}``, and at the end ``{"report": ...}`` or ``{"error": ..., "kind": ...}``. Its log
goes to stderr. It imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from engines.errors import BackendUnavailableError, EngineError
from engines.tensorrt.build import OUT_OF_MEMORY, build_plan
from engines.tensorrt.plan import PlanReport, PlanRequest

_TAIL_LINES = 12
_STALL_SECONDS = 120.0
"""After so long without any use of the processor, the process is taken for stuck."""
_IDLE_SHARE = 1e-3
"""Use of the processor below this share counts as none: Python wakes up now and then."""
_ROOT = Path(__file__).parents[2]
_ERRORS = {error.__name__: error for error in (EngineError, BackendUnavailableError)}
_MEMORY = "Build on a machine with more memory, build smaller shapes, or close other programs"


def build(
    request: PlanRequest,
    *,
    progress: Callable[[str, float], None] = lambda _what, _fraction: None,
    log: Path | None = None,
    device: int = 0,
) -> PlanReport:
    """Build a plan in a subprocess.

    The plan appears under its name complete or not at all. If ``progress`` raises, or Ctrl-C is pressed, the
    subprocess is ended, its files are removed, and the exception goes on.

    Args:
        request: what to build.
        progress: called in this process with what is being done and the fraction done, 0 to 1.
        log: file for everything that the library says; None keeps only its last lines, for the error message.
        device: index of the CUDA device to build on, as torch counts; the subprocess sees no other.

    Raises:
        BackendUnavailableError: if the library is missing or too old, or cannot start here.
        EngineError: if the build fails (see `build_plan`), or the subprocess crashes, runs out of memory, hangs or is
            killed: the message holds the signal, the last lines of the log and a way out.
    """
    plan = request.plan.absolute()
    try:
        folder = tempfile.TemporaryDirectory(dir=plan.parent, prefix=f".{plan.name}.")
        log = log or Path(folder.name) / "log"
        output = log.open("wb")
    except OSError as error:
        raise EngineError(
            f"cannot build {plan}: {error}. Choose a folder that exists and can be written to."
        ) from error
    inner = replace(
        request,
        onnx=request.onnx.absolute(),
        plan=Path(folder.name) / plan.name,
        timing_cache=request.timing_cache and request.timing_cache.absolute(),
    )
    with folder, output:
        code, last, stuck = _run(inner, progress, output, device)
        if stuck:
            raise EngineError(
                f"the process that builds {request.onnx.name} with {request.flavour} was ended: for "
                f"{_STALL_SECONDS:.0f} s it did nothing, which happens when the library runs out of memory for its "
                f"threads. {_MEMORY}."
            )
        if "report" in last and code == 0:
            inner.plan.replace(plan)
            return PlanReport.from_json(last["report"])
        if "error" in last:
            raise _ERRORS.get(last["kind"], EngineError)(last["error"])
        raise EngineError(_obituary(request, code, log))


def _run(
    request: PlanRequest, progress: Callable[[str, float], None], log: IO[bytes], device: int
) -> tuple[int, dict[str, Any], bool]:
    """Start the process and listen to it; return its exit code, the last thing it said, and whether it got stuck."""
    last: dict[str, Any] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "engines.tensorrt.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=_ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": _visible(device)},
        encoding="utf-8",
    ) as child:
        done, stuck = threading.Event(), threading.Event()
        watch = threading.Thread(target=_end_if_stuck, args=(child, done, stuck), daemon=True)
        watch.start()
        try:
            if child.stdin is None or child.stdout is None:
                raise EngineError("the process that builds has no pipes.")
            with contextlib.suppress(BrokenPipeError), child.stdin:  # a process that is already dead says so below
                json.dump(request.as_json(), child.stdin)
            for line in child.stdout:
                last = json.loads(line)
                if "progress" in last:
                    progress(*last["progress"])
            return child.wait(), last, stuck.is_set()
        finally:
            done.set()
            watch.join()
            child.kill()


def _end_if_stuck(child: subprocess.Popen[str], done: threading.Event, stuck: threading.Event) -> None:
    """End a process that has stopped working; TensorRT-RTX waits for ever for a thread that could not be started."""
    used, since = 0.0, time.monotonic()
    while not done.wait(_STALL_SECONDS / 10):
        seconds, now = _processor_seconds(child.pid), time.monotonic()
        if seconds is None:
            return
        if seconds - used > _IDLE_SHARE * (now - since):
            used, since = seconds, now
        elif now - since > _STALL_SECONDS:
            stuck.set()
            child.kill()
            return


def _processor_seconds(process: int) -> float | None:
    """Return the time that a process has used the processor; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _visible(device: int) -> str:
    """Return the one device of those that this process sees, for CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(device)
    names = visible.split(",")
    return names[device] if device < len(names) else visible


def _obituary(request: PlanRequest, code: int, log: Path) -> str:
    """Say how the process that builds ended without a word of its own."""
    text = log.read_text(encoding="utf-8", errors="replace")
    tail = "\n  ".join(text.splitlines()[-_TAIL_LINES:]) or "(empty)"
    how = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    if how == "SIGKILL":
        how, advice = "SIGKILL, most likely by the system for lack of memory", _MEMORY
    elif OUT_OF_MEMORY.search(text):
        how, advice = f"{how}, out of memory", _MEMORY
    elif code == 1:  # an exception in Python that nobody expected
        advice = "This is a fault of icexport: please report it with this log"
    else:
        advice = (
            "A crash of the library itself: export at another opset (attention with heads narrower than 16 at opset "
            "23 is known to crash TensorRT-RTX 1.7), or use another backend"
        )
    return (
        f"the process that built {request.onnx.name} with {request.flavour} ended without a result ({how}). {advice}. "
        f"End of its log:\n  {tail}"
    )


def _main(requests: IO[str], answers: IO[str]) -> int:
    """Serve one request."""

    def send(**message: Any) -> None:
        answers.write(f"{json.dumps(message)}\n")
        answers.flush()

    try:
        request = PlanRequest.from_json(json.load(requests))
        report = build_plan(request, lambda what, fraction: send(progress=[what, fraction]))
    except EngineError as error:
        send(error=str(error), kind=type(error).__name__)
        return 1
    except MemoryError as error:
        send(error=f"the builder ran out of memory: {error}. {_MEMORY}.", kind=EngineError.__name__)
        return 1
    send(report=report.as_json())
    return 0


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    sys.exit(_main(sys.stdin, pipe))
