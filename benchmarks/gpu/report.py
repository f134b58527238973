"""What a phase of the GPU suite writes down: one JSON file, complete after every item."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from icexport.host.files import write_whole

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

SCHEMA = 1
RUNNING, OK, FAILED, NOT_AVAILABLE, TIMED_OUT = "running", "ok", "failed", "not available", "timed out"


class NotAvailable(Exception):  # noqa: N818  an answer, not an error
    """Something cannot be done on this machine; the message says why."""


@dataclass(frozen=True)
class Context:
    """How a phase is to run.

    Attributes:
        device: ``cuda``, or ``cpu`` for a dry run with tiny sizes.
        work: folder for bundles and other large files, shared by the phases.
    """

    device: str
    work: Path

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device != "cpu"

    def need_cuda(self) -> None:
        """Leave the phase or item unless there is a GPU.

        Raises:
            NotAvailable: if the device is a CPU.
        """
        if not self.cuda:
            raise NotAvailable("it needs a CUDA device, and this is a dry run on the CPU")


class Report:
    """Collects the items of one phase.

    Args:
        path: the JSON file; it is replaced as a whole after every item.
        about: entries of the file that do not change.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"schema": SCHEMA, **about, "status": RUNNING, "error": "", "items": []}
        write_json(path, self._content)

    def item(self, name: str) -> Item:
        """Return a context manager for one thing to try; what its block raises is recorded, and the phase goes on."""
        return Item(name, self)

    def add(self, entry: dict[str, Any]) -> None:
        """Append one item and save."""
        self._content["items"].append(entry)
        write_json(self._path, self._content)

    def finish(self) -> None:
        """End the phase; its items decide how it went."""
        found = [item["status"] for item in self._content["items"]]
        failed = [item["name"] for item in self._content["items"] if item["status"] == FAILED]
        self._content["error"] = f"failed: {', '.join(failed)}" if failed else ""
        none = bool(found) and set(found) == {NOT_AVAILABLE}
        self._content["status"] = FAILED if failed else NOT_AVAILABLE if none else OK
        write_json(self._path, self._content)


class Item:
    """One thing that is tried.

    Attributes:
        values: what was found; filled in the ``with`` block, JSON types only.
        goals: goals by name, as ``measure.at_least`` makes them. A goal that is missed is no failure.
    """

    def __init__(self, name: str, report: Report) -> None:
        self._name = name
        self._report = report
        self.values: dict[str, Any] = {}
        self.goals: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        """Start the clock."""
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Record what happened; only exceptions that are no errors (Ctrl-C) leave the block."""
        if error is not None and not isinstance(error, Exception):
            return False
        status, reason = OK, ""
        if error is not None:
            status = NOT_AVAILABLE if isinstance(error, NotAvailable) else FAILED
            reason = str(error) if status == NOT_AVAILABLE else f"{type(error).__name__}: {error}"
        if status == FAILED:
            logger.error("%s failed", self._name, exc_info=(type(error), error, trace))  # type: ignore[arg-type]
        entry: dict[str, Any] = {"name": self._name, "status": status, "reason": reason}
        entry["seconds"] = round(time.perf_counter() - self._started, 3)
        self._report.add({**entry, "values": self.values, "goals": self.goals})
        return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once: a reader, or a kill in the middle, never sees half of it."""
    write_whole(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not know, by words."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
