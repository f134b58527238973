"""What reaches the user: results on stdout; log, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from icexport.host.files import finite
from icexport.progress import Ticker

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Self

OURS = ("icexport", "engines", "training")
_PIPE_WIDTH = 160
"""Columns of a table that goes to a file or another program."""
_LABEL_WIDTH = 42
"""Columns of a step's number and name."""


@functools.cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Write one message to stderr."""
    _stderr().print(text)


def emit(document: Any) -> None:
    """Write the one JSON document of ``--json`` to stdout; NaN and infinite, which JSON lacks, become null."""
    typer.echo(json.dumps(finite(document), indent=2, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows in aligned columns to stdout."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*row)
    for column in grid.columns:
        column.overflow = "fold"
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False, markup=False, emoji=False).print(grid)


def show(document: dict[str, Any]) -> None:
    """Write a document for people: lists of objects as tables, everything else as a line."""
    tables = {k: v for k, v in document.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for name, value in document.items():
        if name not in tables:
            typer.echo(f"{name.replace('_', ' ')}: {_cell(value)}")
    for name, rows in tables.items():
        typer.echo(f"\n{name.replace('_', ' ')}:")
        table([c.replace("_", " ") for c in rows[0]], [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    return str(value)


class Steps:
    """The steps of a long command, on stderr: the done ones with their seconds, the running one with how far it is.

    On a terminal, a bar shows the running one. Elsewhere a line tells of it whenever nothing else was told for a
    while; also before the first step. Use it as a context manager; it is an ``icexport.progress.Progress``. Libraries
    are silenced meanwhile; what they print to stdout all the same goes to stderr.

    Args:
        seconds: how long nothing has been told when a line tells of the running step.

    Attributes:
        begun: number of steps so far.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._quiet = not logging.getLogger(OURS[0]).isEnabledFor(logging.INFO)
        self._live = not self._quiet and _stderr().is_terminal and not _stderr().is_dumb_terminal
        name, part = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[part]"))
        columns = (SpinnerColumn(), name, BarColumn(bar_width=20), part, TimeElapsedColumn())
        self._bar = Progress(*columns, console=_stderr(), transient=True, refresh_per_second=4)
        self._ticker = Ticker(self._tell, seconds)
        self._open = contextlib.ExitStack()
        self._step, self._part, self._started, self._expected = "", "", 0.0, 0
        self.begun = 0

    def __enter__(self) -> Self:
        self._open.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._started = perf_counter()
        if not self._quiet and not self._live:
            self._open.enter_context(self._ticker)
        return self

    def expect(self, steps: int, /) -> None:
        """Hear, before the first step, how many there will be."""
        self._expected = steps

    def __call__(self, step: str, done: float | None = None, total: float = 1.0, /) -> None:
        """Begin ``step``, which ends the one before it; or, with the name of the running step, show how far it is."""
        if not self.begun:
            silence_libraries()  # not before: a cache hit has no steps and must not pay for the imports
            if self._live:  # not before, either: the bars of downloads come before the first step
                self._open.enter_context(self._bar)
        if step != self._step:
            self._begin(step)
        self._part = "" if done is None else f"{done:.0%}" if total == 1 else f"{done:g}/{total:g}"
        for task in self._bar.task_ids:
            self._bar.update(task, total=None if done is None else total, completed=done or 0, part=self._part)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ticker.telling():
            if error is None:
                self._finish()
        self._open.__exit__(kind, error, trace)

    def _begin(self, step: str) -> None:
        with self._ticker.telling():
            self._finish()
            self._step, self._part, self._started = step, "", perf_counter()
            self.begun += 1
        self._bar.add_task(self._label(), total=None, part="")

    def _finish(self) -> None:
        if self.begun and not self._quiet:
            say(self._line())
        for task in self._bar.task_ids:
            self._bar.remove_task(task)

    def _tell(self) -> None:
        say(f"{self._line()}{self._part and ', '}{self._part} ...")

    def _line(self) -> str:
        return f"{self._label():{_LABEL_WIDTH}} {perf_counter() - self._started:6.1f} s"

    def _label(self) -> str:
        if not self.begun:
            return "prepare"
        number = f"[{self.begun:>{len(str(self._expected))}}/{self._expected}] " if self._expected else ""
        return number + self._step


class _Handler(logging.Handler):
    """Log records on the console that also draws the progress, so that neither garbles the other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; warnings and errors say that they are."""
        level = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        try:
            say(level + self.format(record))
        except (OSError, ValueError):  # stderr is closed
            self.handleError(record)


def configure(verbosity: int) -> None:
    """Set up logging, once for each command.

    Args:
        verbosity: level, -1 for ``-q``, 0, 1 for ``-v`` or 2 for ``-vv``.
    """
    ours = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    others = {-1: logging.ERROR, 0: logging.ERROR, 1: logging.WARNING}.get(verbosity, logging.DEBUG)
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _Handler)] + [_Handler()]
    root.setLevel(others)
    for name in OURS:
        logging.getLogger(name).setLevel(ours)


def silence_libraries() -> None:
    """Switch off bars and warnings of the libraries below, unless -vv asks for everything.

    Downloads keep their bars. Imports diffusers and transformers: call it only where they are about to be used.
    """
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets reads it when it is imported
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # only once torch, which resets it, is imported
    huggingface_hub.utils.enable_progress_bars()  # type: ignore[attr-defined]  # transformers switched these off, too
