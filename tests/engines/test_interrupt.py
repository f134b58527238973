"""Ctrl-C while a native call runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch

from engines import interrupt
from engines.interrupt import Interruptible
from engines.onnxruntime import OnnxRuntimeEngine

LOOP = """
<ir_version: 8, opset_import: ["" : 18]>
graph (int64 n, float[s, s] x) => (float[s, s] y) <bool go = {1}> {
    y = Loop (n, go, x) <body = step (int64 i, bool c, float[s, s] a) => (bool d, float[s, s] b) {
        d = Identity (c)
        b = MatMul (a, a)
    }>
}
"""


@pytest.fixture
def ctrl_c() -> Iterator[threading.Timer]:
    """Presses Ctrl-C 0.3 s after its start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, before)


def test_a_long_call_of_onnx_runtime_ends_and_the_engine_goes_on(tmp_path: Path, ctrl_c: threading.Timer) -> None:
    onnx.save(onnx.parser.parse_model(LOOP), tmp_path / "loop.onnx")
    engine = OnnxRuntimeEngine("loop", tmp_path / "loop.onnx")
    x = torch.eye(256)
    ctrl_c.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine({"n": torch.tensor(10**9), "x": x})
    assert time.monotonic() - started < 10
    assert torch.equal(engine({"n": torch.tensor(2), "x": x})["y"], x)
    engine.close()


def test_the_call_has_ended_when_the_interruption_is_raised(ctrl_c: threading.Timer) -> None:
    stopped, ended = threading.Event(), threading.Event()

    def run() -> None:
        stopped.wait(20)
        time.sleep(0.2)
        ended.set()

    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        Interruptible()(run, stopped.set)
    assert ended.is_set()


def test_a_second_ctrl_c_does_not_leave_the_call_behind(ctrl_c: threading.Timer) -> None:
    stopped, ended = threading.Event(), threading.Event()

    def run() -> None:
        stopped.wait(20)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.set()

    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        Interruptible()(run, stopped.set)
    assert ended.is_set()


def test_only_what_may_be_long_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_LONG_S", 0.05)
    run, ran_in = Interruptible(), list[bool]()

    def call(seconds: float) -> None:
        ran_in.append(threading.current_thread() is threading.main_thread())
        time.sleep(seconds)

    for seconds in (0.0, 0.1, 0.0, 0.0):
        run(lambda seconds=seconds: call(seconds), list)
    assert ran_in == [False, True, False, True]
    run.close()


def test_other_threads_run_their_calls_themselves() -> None:
    run, found = Interruptible(), list[threading.Thread]()
    thread = threading.Thread(target=run, args=(lambda: found.append(threading.current_thread()), list))
    thread.start()
    thread.join()
    assert found == [thread]


def test_errors_are_raised_and_closing_ends_the_thread() -> None:
    run, count = Interruptible(), threading.active_count()
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0, list)
    assert threading.active_count() == count + 1
    run.close()
    assert threading.active_count() == count
