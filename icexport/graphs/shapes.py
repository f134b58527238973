"""Shapes with symbols: what the inputs and outputs of a graph are, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DIMENSION = re.compile(r"(?:(\d+)\*)?([a-z_]\w*)")


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph.

    Attributes:
        name: name in the graph.
        dtype: element type, as torch names it.
        shape: a size, or a symbol with or without a factor, for each axis; see ``engines.TensorSpec``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def symbols(self) -> set[str]:
        """The symbols in its shape."""
        return {symbol_of(size) for size in self.shape if isinstance(size, str)}


def size_of(dimension: int | str, symbols: Mapping[str, Any]) -> Any:
    """Return the value of one dimension of a graph's shape: ``"4*rows"`` with ``{"rows": 16}`` is 64.

    The symbols may also stand for dimensions of ``torch.export``.
    """
    if isinstance(dimension, int):
        return dimension
    factor, symbol = _parsed(dimension)
    return symbols[symbol] if factor == 1 else factor * symbols[symbol]


def symbol_of(dimension: str) -> str:
    """Return the symbol in one dimension of a graph's shape: ``"rows"`` of ``"4*rows"``."""
    return _parsed(dimension)[1]


def _parsed(dimension: str) -> tuple[int, str]:
    match = _DIMENSION.fullmatch(dimension)
    if not match:
        raise ValueError(f"not a dimension: {dimension!r}")
    return int(match[1] or 1), match[2]
