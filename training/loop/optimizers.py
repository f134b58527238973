"""The optimisers that training can choose from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from icexport.errors import UsageError

OPTIMIZERS = ("adamw", "adamw-8bit")
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def new_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return a new optimiser. Its learning rate is 0: whoever steps it sets the rate of every update.

    Args:
        name: one of ``OPTIMIZERS``.
        parameters: what to train.
        device: where the parameters are going to be.
        betas: decays of the first and second moment.
        eps: number that is added to the root of the second moment.
        weight_decay: decoupled weight decay of all parameters.

    Raises:
        UsageError: the 8-bit optimiser was asked for and bitsandbytes is missing.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type in _FUSED_DEVICES, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            f"The optimiser {name} needs bitsandbytes, which cannot be imported ({error}). Install it with "
            "`pip install bitsandbytes`, or use the optimiser adamw."
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer
