"""What reaches the user: results on stdout; log, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from icexport.host.files import finite

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Self

OURS = ("icexport", "engines", "training")
_PIPE_WIDTH = 160
"""Columns of a table that goes to a file or another program."""


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
    """The steps of a long command, on stderr: the done ones with their seconds; on a terminal the running one, too.

    Use it as a context manager; call it with the name of a step when that begins. Libraries are silenced meanwhile;
    what they print to stdout all the same goes to stderr.

    Attributes:
        begun: number of steps so far.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._quiet = not logging.getLogger(OURS[0]).isEnabledFor(logging.INFO)
        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), text, BarColumn(bar_width=20), TimeElapsedColumn())
        hidden = self._quiet or not _stderr().is_terminal
        self._bar = Progress(*columns, console=_stderr(), transient=True, refresh_per_second=4, disable=hidden)
        self._stdout = contextlib.redirect_stdout(sys.stderr)
        self._step, self._started = "", 0.0
        self.begun = 0

    def __enter__(self) -> Self:
        self._stdout.__enter__()
        self._bar.start()
        return self

    def __call__(self, step: str, done: float | None = None, total: float = 1.0, /) -> None:
        """Begin ``step``, which ends the one before it; or, with the name of the running step, show how far it is."""
        if step == self._step and done is not None:
            for task in self._bar.task_ids:
                self._bar.update(task, total=total, completed=done)
            return
        if not self.begun:
            silence_libraries()  # not before: a cache hit has no steps and must not pay for the imports
        self._finish()
        self._step, self._started = step, time.perf_counter()
        self.begun += 1
        self._bar.add_task(step, total=None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bar.stop()
        self._stdout.__exit__(kind, error, trace)

    def _finish(self) -> None:
        if self._step and not self._quiet:
            say(f"{self._step:24} {time.perf_counter() - self._started:6.1f} s")
        for task in self._bar.task_ids:
            self._bar.remove_task(task)


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
