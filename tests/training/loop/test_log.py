"""What a run says while nothing else is to be said."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.toy_task import CONFIG, ToyBatches, ToyTask
from training.loop import log
from training.loop.trainer import Batch, TrainerConfig, train


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log, "SILENCE", 0.01)
    caplog.set_level(logging.INFO)


def wait_for(text: str, caplog: pytest.LogCaptureFixture) -> None:
    end = time.monotonic() + 20
    while text not in caplog.text:
        assert time.monotonic() < end, caplog.text
        time.sleep(0.01)


class SlowBatches(ToyBatches):
    """The first and the fourth batch take until somebody has said that they do."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        super().__init__()
        self.caplog = caplog

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.number in (1, 4):
                wait_for(f"toy: {self.number - 1} of 6 steps, ", self.caplog)
            yield batch


def test_slow_steps_are_told_of_where_there_is_no_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**CONFIG, "steps": 6, "log_every": 6, "decay": 1.0, "warmup": 0}
    train(ToyTask(), SlowBatches(caplog), TrainerConfig(**config), tmp_path)
    assert "toy step 6: " in caplog.text
    shown = caplog.text
    time.sleep(0.05)
    assert caplog.text == shown


def test_what_takes_long_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    with log.underway(logging.getLogger("training.x"), "Opening the data"):
        assert caplog.messages == ["Opening the data"]
        wait_for("s so far", caplog)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))


@pytest.mark.parametrize(
    ("level", "hidden"), [(logging.NOTSET, False), (logging.INFO, False), (logging.WARNING, True)]
)
def test_a_quiet_command_has_no_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: int, hidden: bool) -> None:
    on_a_terminal(monkeypatch)
    monkeypatch.setattr(logging.getLogger("training"), "level", level)
    accelerator: Any = SimpleNamespace(is_main_process=True)
    assert log.TrainingLog(accelerator, tmp_path, "toy", 0, 6, {})._hidden is hidden


def test_the_bar_goes_to_stderr(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=True, log_with=[], trackers=[])
    shown = log.TrainingLog(accelerator, tmp_path, "toy", 0, 1, {})
    assert shown._bar.console.stderr


def test_the_bar_moves_while_the_run_lasts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_a_terminal(monkeypatch)
    accelerator: Any = SimpleNamespace(is_main_process=True, log_with=[], trackers=[])
    with log.TrainingLog(accelerator, tmp_path, "toy", 0, 6, {}) as shown:
        assert shown._bar.live.is_started
        shown.advance(4)
    assert shown._bar.tasks[0].completed == 4
    assert not shown._bar.live.is_started
