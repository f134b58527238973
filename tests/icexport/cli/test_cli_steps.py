"""What a long command shows of its steps, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from icexport.cli import console
from icexport.cli.console import Steps

SHORT = 0.01
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def verbosity(icexport: object) -> None:
    """That of a command without -q or -v; what it changes is restored by the other fixture."""
    console.configure(0)


def show_in(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Not ``sys.stderr``, which pytest puts in its place again before the test."""
    shown = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(console, "_stderr", lambda: shown)
    return stream


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return show_in(io.StringIO(), monkeypatch)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return show_in(Terminal(), monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``clock(20)``: what time it is."""
    now = [0.0]
    monkeypatch.setattr(console, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def wait_for(line: str, stream: io.StringIO) -> None:
    end = time.monotonic() + PATIENCE
    while line not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(SHORT)


def lines(stream: io.StringIO) -> list[str]:
    """What was written, without spaces that align it, each line that the thread repeated only once."""
    found = [re.sub(" +", " ", line) for line in stream.getvalue().splitlines()]
    return [line for i, line in enumerate(found) if line not in found[:i]]


def test_lines_where_there_is_no_terminal(stderr: io.StringIO, clock: Callable[[float], None]) -> None:
    with Steps(SHORT) as steps:
        wait_for("prepare", stderr)
        steps.expect(12)
        steps("export unet")
        clock(20)
        wait_for("20.0 s ...", stderr)
        steps("parity unet", 3, 12)
        clock(50.25)
        wait_for("30.2 s, 3/12 ...", stderr)
        steps("parity unet", 4, 12)
        wait_for("30.2 s, 4/12 ...", stderr)
        steps("plan of unet", 0.371)
        wait_for("37% ...", stderr)
    # The thread may also have been in time for what was true before the clock was set, or the part told.
    assert [line for line in lines(stderr) if not re.search(r"\] .* 0\.0 s( \.\.\.|, 3/12)", line)] == [
        "prepare 0.0 s ...",
        "[ 1/12] export unet 20.0 s ...",
        "[ 1/12] export unet 20.0 s",
        "[ 2/12] parity unet 30.2 s, 3/12 ...",
        "[ 2/12] parity unet 30.2 s, 4/12 ...",
        "[ 2/12] parity unet 30.2 s",
        "[ 3/12] plan of unet 0.0 s, 37% ...",
        "[ 3/12] plan of unet 0.0 s",
    ]


def test_quick_steps_have_one_line_each(stderr: io.StringIO, clock: Callable[[float], None]) -> None:
    with Steps() as steps:
        steps.expect(2)
        for done in range(100):
            steps("measure", done, 100)
        steps("report")
    assert lines(stderr) == ["[1/2] measure 0.0 s", "[2/2] report 0.0 s"]
    assert steps.begun == 2


def test_a_bar_on_a_terminal(terminal: io.StringIO) -> None:
    with Steps(SHORT) as steps:
        time.sleep(5 * SHORT)
        assert terminal.getvalue() == "", "downloads have bars of their own before the first step"
        steps.expect(2)
        steps("export [unet]")  # brackets are not markup
        wait_for("[1/2] export [unet]", terminal)
        wait_for("0:00:00", terminal)
        steps("parity unet", 3, 12)
        wait_for("3/12", terminal)
    assert "..." not in terminal.getvalue()
    assert re.search(r"\[2/2\] parity unet +\d+\.\d s\n", terminal.getvalue())


def test_a_dumb_terminal_gets_lines(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Steps(SHORT) as steps:
        steps("export unet")
        wait_for(" s ...", terminal)
    assert "\x1b" not in terminal.getvalue()


def test_quiet(stderr: io.StringIO) -> None:
    console.configure(-1)
    before = threading.active_count()
    with Steps(SHORT) as steps:
        steps.expect(2)
        steps("export unet", 1, 2)
        assert threading.active_count() == before
        time.sleep(5 * SHORT)
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_is_not_shown_as_done(stderr: io.StringIO, error: type[BaseException]) -> None:
    before = threading.active_count()

    def fail() -> None:
        with Steps(SHORT) as steps:
            steps.expect(2)
            steps("export unet")
            wait_for(" s ...", stderr)
            raise error

    with pytest.raises(error):
        fail()
    shown = stderr.getvalue()
    assert threading.active_count() == before
    assert all(line.endswith("...") for line in shown.splitlines())
    time.sleep(5 * SHORT)
    assert stderr.getvalue() == shown, "told after the end"


def test_nothing_is_told_after_the_end(stderr: io.StringIO) -> None:
    with Steps(SHORT) as steps:
        steps("export unet")
    shown = stderr.getvalue()
    time.sleep(5 * SHORT)
    assert stderr.getvalue() == shown
