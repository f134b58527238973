from __future__ import annotations

import threading
import time

import pytest

from icexport.progress import Ticker, expect, silent
from tests.steps import Told


def test_a_plain_function_is_told_of_steps_only() -> None:
    told = Told()
    expect(told, 7)
    assert told.expected == 7
    expect(silent, 7)


def test_a_ticker_tells_again_and_again_until_the_end() -> None:
    calls, thrice = [], threading.Event()

    def tell() -> None:
        calls.append(threading.current_thread())
        if len(calls) == 3:
            thrice.set()

    with Ticker(tell, 0.001):
        assert thrice.wait(60)
    count = len(calls)
    time.sleep(0.02)
    assert len(calls) == count
    assert not any(thread.is_alive() for thread in calls)


def test_a_ticker_is_quiet_while_something_is_told() -> None:
    calls: list[int] = []
    with Ticker(lambda: calls.append(1), 0.001) as ticker:
        for _ in range(20):
            with ticker.telling():
                count = len(calls)
                time.sleep(0.005)
                assert len(calls) == count


def test_what_is_told_as_the_time_runs_out_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    ticker = Ticker(lambda: calls.append(1), 60)

    def wait(_seconds: float) -> bool:
        """The time runs out, and before the thread goes on, the work tells something and ends."""
        ticker.__exit__()
        return False

    monkeypatch.setattr(ticker._news, "wait", wait)
    monkeypatch.setattr(ticker._thread, "join", lambda: None)
    ticker._run()
    assert calls == []


def test_an_error_ends_the_thread() -> None:
    before = threading.active_count()

    def fail() -> None:
        with Ticker(lambda: None, 0.001):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert threading.active_count() == before
