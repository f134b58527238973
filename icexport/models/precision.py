"""The precisions that a model can be exported in: a row each, with everything that depends on the choice.

Imports no torch: the command line and a cache hit of ``build`` read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from icexport.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        name: name of the precision, as ``--dtype`` takes it.
        torch_name: name of the type in torch.
        onnx_name: name of the type in ONNX, in lower case.
        bytes: size of one weight.
        floor: relative RMS error that always passes parity: what other orders of summation and rounding cost.
        opset: default ONNX opset.
        oldest_opset: oldest opset that can express it.
        capability: smallest compute capability, times ten, of a GPU that has it; 0: every one.
        overflows: whether a model's values may be too large for it; those that are, are moved to float32 after the
            export.
    """

    name: str
    torch_name: str
    onnx_name: str
    bytes: int
    floor: float
    opset: int = 21
    oldest_opset: int = 18
    capability: int = 0
    overflows: bool = False

    @property
    def torch(self) -> torch.dtype:
        """The type of torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def reduced(self) -> bool:
        """Whether it is less than the float32 of the reference."""
        return self.torch_name != "float32"


# Opset 21 is the first with a native GroupNormalization, 22 the first whose convolutions take bfloat16. Other orders
# of summation cost about 1e-6 in float32 and 3e-4 in float16; bfloat16 has 3 bits less, and 8 times the rounding.
_ROWS = (
    Precision("fp32", "float32", "float", 4, floor=1e-4),
    Precision("fp16", "float16", "float16", 2, floor=1e-3, overflows=True),
    Precision("bf16", "bfloat16", "bfloat16", 2, floor=8e-3, opset=22, oldest_opset=22, capability=80),
)

PRECISIONS = {row.name: row for row in _ROWS}
REFERENCE = PRECISIONS["fp32"]
"""What every engine is compared with."""


def precision(name: str) -> Precision:
    """Return the precision called ``name``.

    Raises:
        UsageError: there is no precision of this name; those that exist are listed.
    """
    if name not in PRECISIONS:
        raise UsageError(f"--dtype {name}: choose {' or '.join(PRECISIONS)}.")
    return PRECISIONS[name]
