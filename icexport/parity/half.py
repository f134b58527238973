"""PyTorch in float16 or bfloat16 as a GPU computes it, on a CPU: products summed in float32, results rounded.

A CPU without float16 arithmetic takes hundreds of times as long for a float16 convolution as for one in float32 (280
times on an AMD EPYC, torch 2.13). What the precision costs in digits is in the weights and in the rounding of every
result, and both stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_LOW = (torch.float16, torch.bfloat16)
_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("addmm", "baddbmm", "bmm", "conv2d", "convolution", "linear", "matmul", "mm")
)


class WideProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, matrix products and convolutions of low precision are computed in float32 and rounded."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator; see ``TorchDispatchMode``."""
        low = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in _LOW), None)
        if low is None or func.overloadpacket not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        found: Tensor = func(*tree_map(_widened, args), **(kwargs or {}))
        return found.to(low)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value
