"""The precisions that a model can be exported in."""

from __future__ import annotations

import torch

from icexport.errors import UsageError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of ``fp32``, ``fp16`` or ``bf16``.

    Raises:
        UsageError: another name.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose {' or '.join(DTYPES)}.")
    return DTYPES[dtype]
