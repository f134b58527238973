"""Builds in a process of their own: what comes back, and what is left, when that process ends in any way."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engines.errors import BackendUnavailableError, EngineError
from engines.tensorrt import worker
from engines.tensorrt.build import PlanRequest
from tests.engines.tensorrt.onnx_models import HALF, conv, save

pytestmark = pytest.mark.tensorrt
ROOT = Path(__file__).parents[3]


@pytest.fixture
def request_(tmp_path: Path) -> PlanRequest:
    """One convolution, in a folder with nothing else in it."""
    node, weight = conv("only", "x", "y", HALF)
    path = save(tmp_path / "conv.onnx", [node], dict.fromkeys("xy", HALF), [weight])
    (tmp_path / "plans").mkdir()
    return PlanRequest("tensorrt-rtx", path, tmp_path / "plans" / "conv.plan", "fp16", targets=(89,))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a module in the place of classic TensorRT, in the process that builds."""

    def make(code: str) -> None:
        folder = tmp_path / "fake"
        folder.mkdir()
        (folder / "tensorrt.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return make


def child() -> psutil.Process:
    """The process that builds."""
    (found,) = psutil.Process().children()
    return found


def left(request: PlanRequest) -> list[str]:
    return [path.name for path in request.plan.parent.iterdir()]


def test_a_plan_comes_back(request_: PlanRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    monkeypatch.chdir(tmp_path)
    seen: list[float] = []
    relative = PlanRequest("tensorrt-rtx", Path("conv.onnx"), Path("plans/conv.plan"), "fp16", targets=(86, 89))

    report = worker.build(relative, progress=lambda what, fraction: seen.append(fraction), log=tmp_path / "log")

    assert report.plan_bytes == request_.plan.stat().st_size > 0
    assert report.targets == (86, 89)
    assert report.precision["fp16"] > 0
    assert report.peak_memory_bytes is not None
    assert report.peak_memory_bytes < 500 * 2**20, "the memory of this process, torch and all, does not count"
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert left(request_) == ["conv.plan"]
    log = (tmp_path / "log").read_text()
    imported = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
    packages = {name.partition(".")[0] for name in imported}
    assert "onnx" in packages
    assert "torch" not in packages
    assert "INFO " in log, "what the library says is in the log"


@pytest.mark.parametrize(
    ("number", "cause", "advice"),
    [
        (signal.SIGKILL, "SIGKILL, most likely by the system for lack of memory", "more memory"),
        (signal.SIGSEGV, "SIGSEGV", "narrower than 16 at opset 23"),
        (signal.SIGABRT, "SIGABRT", "another backend"),
    ],
)
def test_a_process_that_is_killed(request_: PlanRequest, number: signal.Signals, cause: str, advice: str) -> None:
    request_.plan.write_bytes(b"older plan")

    with pytest.raises(EngineError, match=f"conv.onnx with tensorrt-rtx ended without a result .{cause}") as error:
        worker.build(request_, progress=lambda what, fraction: child().send_signal(number))

    assert advice in str(error.value)
    assert "End of its log:" in str(error.value)
    assert request_.plan.read_bytes() == b"older plan"
    assert left(request_) == ["conv.plan"]


def test_a_process_that_is_stuck_is_ended(request_: PlanRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STALL_SECONDS", 1.0)
    with pytest.raises(EngineError, match="conv.onnx with tensorrt-rtx was ended: for 1 s it did nothing") as error:
        worker.build(request_, progress=lambda what, fraction: child().suspend())

    assert "smaller shapes" in str(error.value)
    assert left(request_) == []


def test_a_process_that_works_is_left_alone(
    request_: PlanRequest, fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_STALL_SECONDS", 0.5)
    fake("import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass\nraise SystemExit(7)")
    with pytest.raises(EngineError, match="exit code 7"):
        worker.build(PlanRequest("tensorrt", request_.onnx, request_.plan, "fp16"))


def test_memory_that_comes_to_an_end(request_: PlanRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STALL_SECONDS", 5.0)  # sometimes the library waits for a thread that has no memory

    def starve(what: str, fraction: float) -> None:
        if what == "parsing":
            process = child()
            limit = process.memory_info().vms + 2**20
            resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))

    with pytest.raises(EngineError, match="out of memory") as error:
        worker.build(request_, progress=starve)

    assert "smaller shapes" in str(error.value)
    assert left(request_) == []


def test_a_crash_for_lack_of_memory_is_called_so(request_: PlanRequest, fake: Callable[[str], None]) -> None:
    said = "terminate called after throwing an instance of 'std::bad_alloc'"
    fake(f"import os, sys\nprint({said!r}, *range(30), sep='\\n', file=sys.stderr, flush=True)\nos.abort()")
    with pytest.raises(EngineError, match="SIGABRT, out of memory.. Build on a machine with more memory") as error:
        worker.build(PlanRequest("tensorrt", request_.onnx, request_.plan, "fp16"))
    assert str(error.value).endswith("\n  28\n  29")
    assert "terminate called" not in str(error.value), "only the end of the log is quoted"


def test_an_exception_in_progress_ends_the_process(request_: PlanRequest) -> None:
    started: list[psutil.Process] = []

    def fail(what: str, fraction: float) -> None:
        started.append(child())
        raise RuntimeError("the display is gone")

    with pytest.raises(RuntimeError, match="the display is gone"):
        worker.build(request_, progress=fail)

    assert left(request_) == []
    assert len(started) == 1
    assert not started[0].is_running()


DRIVER = """
import sys
from pathlib import Path
from engines.tensorrt import worker
from engines.tensorrt.build import PlanRequest
import psutil

def show(what, fraction):
    process, = psutil.Process().children()
    process.suspend()  # as a builder that takes long
    print(process.pid, flush=True)

try:
    worker.build(PlanRequest("tensorrt-rtx", Path(sys.argv[1]), Path(sys.argv[2]), "fp16"), progress=show)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def building(request_: PlanRequest) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A program that builds, and the process in which it does; the latter is stopped."""
    command = [sys.executable, "-c", DRIVER, str(request_.onnx), str(request_.plan)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert program.stdout is not None
    return program, psutil.Process(int(program.stdout.readline()))


def test_ctrl_c_ends_both_and_leaves_nothing(
    request_: PlanRequest, building: tuple[subprocess.Popen[str], psutil.Process]
) -> None:
    program, builder = building

    os.killpg(program.pid, signal.SIGINT)  # as a terminal does

    assert program.wait(10) == 130
    assert not builder.is_running()
    assert left(request_) == []


def test_a_builder_whose_program_died_ends_too(building: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    program, builder = building

    program.kill()
    program.wait(10)
    builder.resume()

    end = time.monotonic() + 10
    while builder.is_running() and builder.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    assert not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE


def test_errors_come_back_as_they_are(request_: PlanRequest) -> None:
    request_.onnx.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="conv.onnx is damaged or cut short") as error:
        worker.build(request_)
    assert "log" not in str(error.value)
    assert left(request_) == []


def test_a_library_that_is_too_old(request_: PlanRequest, fake: Callable[[str], None]) -> None:
    fake("print('chatter of a library')\n__version__ = '10.8.0'")
    request = PlanRequest("tensorrt", request_.onnx, request_.plan, "fp16")
    with pytest.raises(BackendUnavailableError, match="tensorrt 10.8.0 is too old, 10.9 is needed.*pip install"):
        worker.build(request)


def test_a_fault_of_ours_is_called_so(request_: PlanRequest, fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("print('chatter of a library')\n__version__ = '10.9'\nclass ILogger: pass")
    request = PlanRequest("tensorrt", request_.onnx, request_.plan, "fp16")
    with pytest.raises(EngineError, match="exit code 1.*fault of icexport") as error:
        worker.build(request, log=tmp_path / "log")
    assert "AttributeError: module 'tensorrt' has no attribute 'Builder'" in str(error.value)
    assert "chatter of a library" in (tmp_path / "log").read_text()


def test_a_folder_that_cannot_be_written(request_: PlanRequest) -> None:
    request_.plan.parent.rmdir()
    with pytest.raises(EngineError, match="cannot build .*conv.plan.*Choose a folder that exists"):
        worker.build(request_)


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [(None, 0, "0"), (None, 3, "3"), ("2,5", 1, "5"), ("GPU-8a1f,GPU-77c0", 0, "GPU-8a1f"), ("", 0, "")],
)
def test_the_process_sees_one_gpu(
    request_: PlanRequest,
    fake: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    device: int,
    expected: str,
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    fake("import os\nraise ImportError('sees <' + os.environ['CUDA_VISIBLE_DEVICES'] + '>')")
    with pytest.raises(BackendUnavailableError, match=f"sees <{expected}>"):
        worker.build(PlanRequest("tensorrt", request_.onnx, request_.plan, "fp16"), device=device)
