"""Runs a command and watches it: memory of its processes, how long it says nothing, how it ends. Linux only."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.2
_LAST_LINES = 5
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Watched:
    """What was seen of a command; sizes are in bytes.

    Attributes:
        exit_code: its exit code, or minus the number of the signal that ended it.
        over_limit: whether it was killed here, because its processes passed the limit.
        seconds: wall time from its start to its end.
        own_peak: largest resident size of the process itself (VmHWM), mapped files included.
        child_peak: the same of that of its descendants which was largest; 0: none lived for two looks.
        exit_peak: what the kernel tells at its end of itself and the children that it waited for; 0: not known.
        resident_peak: largest sum of all its processes at one look; pages that they share count for each.
        anonymous_peak: the same without mapped files, whose pages the kernel can drop and read again.
        longest_silence: seconds, the longest of them without a new line on stderr.
        last_lines: the last lines of stdout and stderr together.
        peak_line: the last line before that largest sum.
    """

    exit_code: int
    over_limit: bool
    seconds: float
    own_peak: int
    child_peak: int
    exit_peak: int
    resident_peak: int
    anonymous_peak: int
    longest_silence: float
    last_lines: tuple[str, ...]
    peak_line: str

    @property
    def peak(self) -> int:
        """The largest resident size that any one of its processes ever had."""
        return max(self.own_peak, self.child_peak, self.exit_peak)


def watch(command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str], limit: int) -> Watched:
    """Run a command to its end, or until its processes together pass a limit; then all of them are killed.

    Args:
        command: program and arguments.
        folder: where it runs.
        log: file that gets all of its output.
        environment: its whole environment.
        limit: most resident bytes of its processes together, mapped files included.

    Raises:
        OSError: it cannot be started.
    """
    log.write_bytes(b"")
    with log.open("ab", buffering=0) as sink:  # appended by the command, too: both streams in their order
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603  what the caller asks for
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        memory, silence = _Memory(process.pid, log), _Silence(started)
        try:
            over = _follow(process, sink, memory, silence, limit)
        finally:
            kill(process.pid)  # before it is reaped, while its number cannot belong to another process
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        ended = time.monotonic()
        silence.said(ended)
    # Until it runs its program, a new process is a copy of this one, and the kernel counts that as its memory.
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Watched(
        exit_code=process.returncode,
        over_limit=over,
        seconds=round(ended - started, 2),
        own_peak=memory.own_peak,
        child_peak=memory.child_peak,
        exit_peak=1024 * usage.ru_maxrss if usage.ru_maxrss > floor else 0,
        resident_peak=memory.resident_peak,
        anonymous_peak=memory.anonymous_peak,
        longest_silence=round(silence.longest, 2),
        last_lines=tuple(_lines(log)[-_LAST_LINES:]),
        peak_line=memory.peak_line,
    )


def kill(leader: int) -> None:
    """Kill a process that leads a session, the session, and all descendants."""
    for pid in processes(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes(leader: int) -> set[int]:
    """Return the processes of a session and their descendants, in sessions of their own, too."""
    families: dict[int, list[int]] = {}
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            _, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            families.setdefault(int(parent), []).append(int(folder.name))
            if int(session) == leader:
                found.add(int(folder.name))
    new = list(found)
    while new:
        children = set(families.get(new.pop(), [])) - found
        found |= children
        new += children
    return found


class _Memory:
    """The largest sizes of a process and its descendants at the looks so far, and what its log said at the largest."""

    def __init__(self, leader: int, log: Path) -> None:
        self._leader, self._log = leader, log
        self.peak_line = ""
        self._seen: set[int] = set()
        self.own_peak = self.child_peak = self.resident_peak = self.anonymous_peak = 0

    def look(self) -> int:
        """Return the resident bytes of all processes together.

        A child counts from the second look on: at the first one it may not run its program yet, and be a copy of its
        parent whose pages would count twice.
        """
        found = processes(self._leader)
        resident = anonymous = 0
        for pid in found & (self._seen | {self._leader}):
            sizes = _sizes(pid)
            if pid == self._leader:
                self.own_peak = max(self.own_peak, sizes.get("VmHWM", 0))
            else:
                self.child_peak = max(self.child_peak, sizes.get("VmHWM", 0))
            resident += sizes.get("VmRSS", 0)
            anonymous += sizes.get("RssAnon", 0)
        self._seen = found
        if resident > self.resident_peak:
            self.resident_peak = resident
            self.peak_line = "".join(_lines(self._log)[-1:])
        self.anonymous_peak = max(self.anonymous_peak, anonymous)
        return resident


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _sizes(pid: int) -> dict[str, int]:
    """Return the sizes in a process's status, in bytes; empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in words}


class _Silence:
    """The longest time between two lines, begin and end included."""

    def __init__(self, started: float) -> None:
        self._last = started
        self.longest = 0.0

    def said(self, now: float) -> None:
        self.longest = max(self.longest, now - self._last)
        self._last = now


def _follow(process: subprocess.Popen[bytes], sink: IO[bytes], memory: _Memory, silence: _Silence, limit: int) -> bool:
    """Copy a process's stderr and look at its memory until it has ended (False) or passed the limit (True)."""
    if process.stderr is None:
        raise ValueError("The process has no pipe as stderr.")
    ended = os.pidfd_open(process.pid)
    with process.stderr as stderr, selectors.DefaultSelector() as selector:
        os.set_blocking(stderr.fileno(), False)
        selector.register(stderr, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        looked = 0.0
        try:
            while True:
                ready = {key.fd for key, _ in selector.select(POLL_SECONDS)}
                if stderr.fileno() in ready and not _copy(stderr, sink, silence):
                    selector.unregister(stderr)
                if time.monotonic() - looked >= POLL_SECONDS:
                    looked = time.monotonic()
                    if memory.look() > limit:
                        return True
                if ended in ready:
                    _copy(stderr, sink, silence)
                    return False
        finally:
            os.close(ended)


def _copy(stderr: IO[bytes], sink: IO[bytes], silence: _Silence) -> bool:
    """Copy what is there; tell whether more may come."""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(stderr.fileno(), _CHUNK):
            sink.write(chunk)
            if b"\n" in chunk:
                silence.said(time.monotonic())
        return False
    return True
