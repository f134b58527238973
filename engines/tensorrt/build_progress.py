"""How far a build is, from the builder's own progress monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class ProgressTree:
    """Turns the nested phases that a builder reports into one fraction.

    A phase's share is one step of the phase that it belongs to. The fraction never falls.

    Attributes:
        fraction: how much of the build is done, 0 to 1.
    """

    def __init__(self) -> None:
        self.fraction = 0.0
        self._phases: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase of ``steps`` steps within ``parent``."""
        self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, index: int) -> None:
        """Complete step ``index``, from 0, of a phase."""
        self._phases[name].done = index + 1
        total = sum(self._share(phase) * phase.done / phase.steps for phase in self._phases.values())
        self.fraction = max(self.fraction, min(total, 1.0))

    def finish(self, name: str) -> None:
        """End a phase."""
        self._phases.pop(name, None)

    def _share(self, phase: _Phase) -> float:
        """Return the part of the whole that a phase stands for."""
        if phase.parent is None:
            return 1.0
        parent = self._phases.get(phase.parent)
        return self._share(parent) / parent.steps if parent else 0.0


def make_progress_monitor(module: Any, progress: Callable[[str, float], None]) -> Any:
    """Make a progress monitor for a builder.

    Args:
        module: the TensorRT library.
        progress: called with the name of the phase and the fraction done each time that another percent is done. If it
            raises, the builder is told to stop, and the exception is kept in the attribute ``failure``.

    Returns:
        A ``module.IProgressMonitor``. Keep a reference to it until the build is over.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._tree = ProgressTree()
            self._percent = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tree.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._tree.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tree.step(phase_name, step)
            percent = int(100 * self._tree.fraction)
            if self.failure is None and percent > self._percent:
                self._percent = percent
                try:
                    progress(phase_name, self._tree.fraction)
                except BaseException as error:  # noqa: BLE001  an exception must not travel through the builder's C++
                    self.failure = error
            return self.failure is None

    return Monitor()
