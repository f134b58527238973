"""Scratch memory while a CUDA graph is captured, and the stream that TensorRT gets."""

from __future__ import annotations

import contextlib

import pytest
import torch

from engines.errors import EngineError
from engines.tensorrt import scratch as scratch_module
from engines.tensorrt.scratch import Scratch


def test_scratch_memory_of_a_captured_graph_is_neither_grown_nor_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch("cpu")
    address = scratch.address(1000)
    with monkeypatch.context() as patch:
        patch.setattr(scratch_module, "capturing", lambda: True)
        assert scratch.address(500) == address
        with pytest.raises(EngineError, match="2000 bytes of scratch memory during the capture"):
            scratch.address(2000)
    kept = [memory.data_ptr() for memory in scratch._captured]
    assert kept == [address]
    assert scratch.address(2000) != address


class FakeStream:
    """A CUDA stream as far as `launch_stream` looks at it."""

    def __init__(self, handle: int, events: list[str]) -> None:
        self.cuda_stream = handle
        self._events = events

    def wait_stream(self, other: FakeStream) -> None:
        self._events.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


@pytest.mark.parametrize(("current", "used"), [(0, 9), (5, 5)], ids=["default stream", "another stream"])
def test_tensorrt_never_gets_the_default_stream(monkeypatch: pytest.MonkeyPatch, current: int, used: int) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(current, events))
    monkeypatch.setattr(scratch_module, "_own_stream", lambda device: FakeStream(9, events))
    with contextlib.suppress(EngineError), scratch_module.launch_stream(torch.device("cuda", 0)) as handle:
        events.append(f"launch on {handle}")
        raise EngineError
    waits = ["9 waits for 0", "launch on 9", "0 waits for 9"]
    assert events == (waits if current == 0 else [f"launch on {used}"])
