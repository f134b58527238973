"""The program as a whole: help, version, exit codes, log levels."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines.errors import BackendUnavailableError, EngineError, OutOfMemoryError, ShapeError
from icexport import __version__
from icexport.cli import console
from icexport.cli.command import exit_code
from icexport.errors import (
    BundleError,
    CheckpointError,
    ConditionError,
    FidelityError,
    IcexportError,
    ParityError,
    UnsupportedOptionError,
    UsageError,
)

ROOT = Path(__file__).parents[3]
COMMANDS = ("build", "export", "generate", "verify", "inspect", "bench", "doctor", "convert", "train")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["build", "--help"], ["generate", "--help"]])
def test_help_and_version_import_nothing_heavy(args: list[str]) -> None:
    run = python(
        f"""
import sys
from icexport.cli.main import main
sys.argv[1:] = {args!r}
try:
    main()
except SystemExit as end:
    heavy = {{"torch", "numpy", "PIL", "diffusers", "transformers", "onnx", "onnxruntime", "cv2", "rich"}}
    print(end.code, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    )
    assert run.stderr.splitlines()[-1] == "0 []", run.stderr
    assert run.stdout


def test_python_m_runs_the_same_program() -> None:
    command = [sys.executable, "-m", "icexport", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == f"icexport {__version__}\n"


def test_help_lists_every_command(icexport) -> None:
    run = icexport("--help")
    assert run.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in run.stdout
        assert icexport(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "args",
    [
        ("bild",),
        ("build",),
        ("build", "--cond", "canny", "--colour"),
        ("build", "--cond", "canny", "--dtype", "fp8"),
        ("build", "--cond", "canny", "--backend", "tensorflow"),
        ("build", "--cond", "canny", "--opset", "new"),
        ("generate", "x", "--prompt", "a", "--seed", "-1"),
        ("generate", "x", "--prompt", "a", "--num-images", "0"),
        ("generate", "x", "--prompt", "a", "--steps", "0"),
        ("generate", "x", "--prompt", "a", "--fit", "zoom"),
        ("generate", "x", "--prompt", "a", "--device", "tpu"),
        ("generate", "x", "--prompt", "a", "--image", "/no/such/file.png"),
        ("inspect", "/no/such/path"),
        ("convert", "/no/such/path", "--output", "x"),
        ("train", "base"),
    ],
)
def test_usage_errors(icexport, args: tuple[str, ...]) -> None:
    run = icexport(*args)
    assert run.exit_code == 2
    assert run.stdout == ""
    assert "Error" in run.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConditionError("x"), 2),
        (UnsupportedOptionError("x"), 2),
        (ShapeError("x"), 2),
        (ParityError("x"), 3),
        (FidelityError("x"), 3),
        (BackendUnavailableError("x"), 4),
        (IcexportError("x"), 1),
        (BundleError("x"), 1),
        (CheckpointError("x"), 1),
        (EngineError("x"), 1),
        (PermissionError("x"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
        (ValueError("x"), 70),
        (KeyError("x"), 70),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class SafetensorError(Exception):
    pass


class ConnectError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "x.data"), "The disk is full. Nothing half-written is left."),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/7"), "The disk is full."),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "disk is full.",
        ),
        (wrapped(ValueError("could not save"), OSError(28, "No space left on device")), "The disk is full."),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "the memory was full. Train with fewer",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "the memory was full. Train with fewer"),
        (RuntimeError("unable to mmap 8 bytes from file </torch_1>: Cannot allocate memory (12)"), "--shm-size"),
        (SafetensorError("Error while deserializing header: incomplete metadata"), "damaged or cut short"),
        (ConnectError("[Errno -2] Name or service not known"), "The network cannot be reached."),
    ],
)
def test_what_libraries_say_of_the_machine_is_no_bug(
    icexport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    monkeypatch.setattr("icexport.cli.inspect.describe", failing(error))
    run = icexport("inspect", tmp_path)
    assert run.exit_code == 1
    assert said in " ".join(run.stderr.split())
    assert str(error.__cause__ or error).split("\n")[0] in " ".join(run.stderr.split())
    assert "A bug of icexport" not in run.stderr


def failing(error: BaseException):
    def describe(*_args: object, **_options: object) -> None:
        raise error

    return describe


def test_an_expected_error_is_one_paragraph(icexport, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("icexport.cli.inspect.describe", failing(BundleError("The bundle is torn. Mend it.")))
    for flags in ((), ("-v",)):
        run = icexport(*flags, "inspect", tmp_path)
        assert (run.exit_code, run.stdout, run.stderr) == (1, "", "Error: The bundle is torn. Mend it.\n")
    assert "Traceback" in icexport("-vv", "inspect", tmp_path).stderr


def test_a_bug_is_admitted(icexport, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("icexport.cli.inspect.describe", failing(KeyError("width")))
    run = icexport("inspect", tmp_path)
    assert run.exit_code == 70
    assert "bug of icexport" in run.stderr
    assert "Traceback" not in run.stderr
    assert "Traceback" in icexport("inspect", tmp_path, "-v").stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 PiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        OutOfMemoryError("there is not enough memory for ONNX Runtime: std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_is_a_failure_and_no_bug(icexport, monkeypatch, tmp_path, error: BaseException) -> None:
    monkeypatch.setattr("icexport.cli.inspect.describe", failing(error))
    run = icexport("inspect", tmp_path)
    assert (run.exit_code, run.stdout) == (1, "")
    assert run.stderr.startswith("Error: Out of memory. ")
    assert run.stderr.endswith(f"({error})\n")


def test_who_runs_out_of_memory_hears_what_needs_less(icexport, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("icexport.builder.build.build", failing(MemoryError()))
    run = icexport("build", "--cond", "canny", "--output", tmp_path / "bundle")
    assert "--height, --width or --batch-size, or with --no-verify" in run.stderr
    monkeypatch.setattr("icexport.bundle.store.Bundle", failing(MemoryError()))
    run = icexport("generate", tmp_path, "--prompt", "a", "--control-map", __file__)
    assert "--low-memory" in run.stderr


def test_so_is_running_out_of_it_on_a_cpu_and_no_other_error_of_torch(icexport, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("icexport.cli.inspect.describe", lambda _path: torch.empty(1 << 56))
    run = icexport("inspect", tmp_path)
    assert run.exit_code == 1
    assert "Cannot allocate memory" in run.stderr
    monkeypatch.setattr("icexport.cli.inspect.describe", lambda _path: torch.empty(2, 3) @ torch.empty(2, 3))
    assert icexport("inspect", tmp_path).exit_code == 70


def test_an_interruption_is_no_error(icexport, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("icexport.cli.inspect.describe", failing(KeyboardInterrupt()))
    run = icexport("inspect", tmp_path)
    assert run.exit_code == 130
    assert run.stderr.startswith("Interrupted.")


@pytest.mark.parametrize(
    ("flags", "ours", "others"),
    [
        ((), logging.INFO, logging.ERROR),
        (("-v",), logging.DEBUG, logging.WARNING),
        (("-vv",), logging.DEBUG, logging.DEBUG),
        (("-q",), logging.WARNING, logging.ERROR),
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_verbosity(icexport, monkeypatch, tmp_path, flags, ours, others, place) -> None:
    levels = []

    def describe(_path: Path) -> tuple[dict[str, str], dict[str, str]]:
        levels.extend(logging.getLogger(name).getEffectiveLevel() for name in ("icexport.x", "engines.x", "library.x"))
        return {}, {}

    monkeypatch.setattr("icexport.cli.inspect.describe", describe)
    args = ("inspect", tmp_path)
    run = icexport(*flags, *args) if place == "before" else icexport(*args, *flags)
    assert run.exit_code == 0, run.stderr
    assert levels == [ours, ours, others]


def test_log_and_steps_go_to_stderr(icexport, capsys) -> None:
    console.configure(0)
    logging.getLogger("icexport.x").warning("%s is %d px", "width", 7)
    with console.Steps() as steps:
        steps("export [unet]")  # brackets are not markup
        steps("parity")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "Warning: width is 7 px"
    assert [line.split("  ")[0] for line in lines[1:]] == ["export [unet]", "parity"]
    assert steps.begun == 2


def test_quiet_shows_no_steps(icexport, capsys) -> None:
    console.configure(-1)
    with console.Steps() as steps:
        steps("export")
    assert capsys.readouterr().err == ""


def test_json_has_no_nan(capsys) -> None:
    console.emit({"scores": [float("nan"), 1.5], "error": float("inf")})
    assert json.loads(capsys.readouterr().out) == {"scores": [None, 1.5], "error": None}
