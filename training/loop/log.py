"""Where a run tells how it goes: lines on disk, trackers, a bar on the terminal, lines elsewhere."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from icexport.host.files import write_whole
from icexport.progress import Ticker

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

SILENCE = 30.0
"""Seconds without a word, after which a line says that the work goes on."""


@contextmanager
def underway(where: logging.Logger, what: str) -> Iterator[None]:
    """Log what the block does when it begins and, every so often, that it is still at it."""
    started = time.perf_counter()
    where.info("%s", what)
    with Ticker(lambda: where.info("%s: %.0f s so far", what, time.perf_counter() - started), SILENCE):
        yield


class TrainingLog:
    """``output/log.jsonl`` and ``output/validation.jsonl``, one JSON object a line, and everything else that looks on.

    Use it as a context manager. Only the first process writes.

    Args:
        accelerator: accelerator of the run; its trackers get every row.
        output: the run's folder.
        name: what is trained.
        first: number of updates that a checkpoint has behind it; rows of later ones are dropped, they are going to be
            repeated.
        steps: number of updates in all.
        settings: what trackers show as the run's configuration.
    """

    def __init__(
        self, accelerator: Accelerator, output: Path, name: str, first: int, steps: int, settings: Mapping[str, Any]
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._accelerator, self._output, self._name, self._first = accelerator, output, name, first
        self._settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[row]}"),
        )
        quiet = logging.getLogger("training").level > logging.INFO  # as -q sets it
        self._hidden = quiet or not (accelerator.is_main_process and sys.stderr.isatty())
        self._bar = Progress(
            TextColumn("{task.description}"), *columns, console=Console(stderr=True), disable=self._hidden
        )
        self._task = self._bar.add_task(name, total=steps, completed=first, row="")
        self._step, self._steps, self._started = first, steps, 0.0
        self._ticker, self._open = Ticker(self._tell, SILENCE), ExitStack()

    def __enter__(self) -> Self:
        if self._accelerator.is_main_process:
            self._output.mkdir(parents=True, exist_ok=True)
            for file in ("log.jsonl", "validation.jsonl"):
                _drop_rows(self._output / file, self._first)
        if self._accelerator.log_with:
            self._accelerator.init_trackers(self._name, self._settings)
        self._started = time.perf_counter()
        if not self._hidden:
            self._open.enter_context(self._bar)
        elif self._accelerator.is_main_process:
            self._open.enter_context(self._ticker)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()
        # Not Accelerator.end_training: it would also end the process group, and a program may train several times.
        self._accelerator.trackers.clear()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._step = step
        self._bar.update(self._task, completed=step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of the log."""
        self._append("log.jsonl", step, values)
        self._accelerator.log(_finite(values), step=step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, row=text)
        if self._hidden:
            with self._ticker.telling():
                logger.info("%s step %d: %s", self._name, step, text)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of the validation's log, if there is anything to say."""
        if not values:
            return
        self._append("validation.jsonl", step, values)
        self._accelerator.log({f"validation/{name}": value for name, value in _finite(values).items()}, step=step)

    def _tell(self) -> None:
        seconds = time.perf_counter() - self._started
        logger.info("%s: %d of %d steps, %.0f s so far", self._name, self._step, self._steps, seconds)

    def _append(self, file: str, step: int, values: Mapping[str, float]) -> None:
        finite = _finite(values)
        row = {"step": step} | {name: finite.get(name) for name in values}  # JSON has no NaN
        with (self._output / file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _drop_rows(path: Path, last: int) -> None:
    """Remove the rows after step ``last``, and one that a crash cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    write_whole(path, "".join(line for line in whole if json.loads(line)["step"] <= last))
