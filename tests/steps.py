"""What the tests know of the steps that long work tells of."""

from __future__ import annotations

import re


class Told:
    """A ``Progress`` that notes what it is told.

    Attributes:
        expected: how many steps were announced.
        names: the steps in their order.
        parts: (step, done, total) of every call that said how far a step is.
    """

    def __init__(self) -> None:
        self.expected = 0
        self.names: list[str] = []
        self.parts: list[tuple[str, float, float]] = []

    def expect(self, steps: int, /) -> None:
        self.expected = steps

    def __call__(self, step: str, done: float | None = None, total: float = 1.0, /) -> None:
        assert self.expected, "a step before the number of steps"
        if step not in self.names[-1:]:
            self.names.append(step)
        if done is not None:
            self.parts.append((step, done, total))


def shown_steps(stderr: str) -> list[str]:
    """The names of the steps that a command's stderr shows as done; all that it announced, in their order."""
    found = re.findall(r"^\[ *(\d+)/(\d+)\] (.*?) +[\d.]+ s$", stderr, re.MULTILINE)
    assert [(int(n), int(m)) for n, m, _ in found] == [(n, len(found)) for n in range(1, len(found) + 1)], stderr
    return [name for *_, name in found]
