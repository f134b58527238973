"""A recorder for captured calls that does on a CPU what a CUDA graph does on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.capture import Function, Recording
from engines.errors import EngineError

_WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}
"""Operators whose result Python, or a shape, depends on: a GPU would have to be waited for."""


class TapeRecorder:
    """Notes the operators of a function once, and replays these: the function's Python code never runs again.

    Every tensor stays where it was in the recording, so that replays read and write the same memory; what Python
    computed in between, numbers and branches, is as it was.

    Attributes:
        recorded: the inputs of every recording.
        replays: how many there were.
    """

    def __init__(self) -> None:
        self.recorded: list[dict[str, Tensor]] = []
        self.replays = 0

    def __call__(self, function: Function, inputs: dict[str, Tensor]) -> Recording:
        self.recorded.append(inputs)
        tape = _Tape()
        with tape:
            outputs = function(inputs)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, outputs


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _WAITING:
            raise EngineError(f"the step cannot be captured in a CUDA graph: {func} waits for the GPU")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.inference_mode()  # which the engines record in; such tensors cannot be written outside of it
    def replay(self) -> None:
        for func, args, kwargs, results in self._calls:
            for fixed, fresh in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(fixed, Tensor) and fixed.data_ptr() != fresh.data_ptr():
                    fixed.copy_(fresh)
