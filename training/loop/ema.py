"""Moving average of the trained parameters, kept apart from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Ema:
    """Averages of a module's trained parameters; under FSDP every process averages its shards.

    After update ``n``, counted from 0: ``mean = d mean + (1 - d) parameter`` with ``d = min(decay, (1+n) / (10+n))``,
    the warm-up of diffusers' ``EMAModel``. Nothing is ever copied back into the parameters.

    Args:
        module: the network, in its final place: on its device, and sharded if it is going to be.
        decay: d in the long run, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._live: dict[str, Tensor] = {n: p.detach() for n, p in fsdp2_canonicalize_names(named).items()}
        self._mean: dict[str, Tensor] = {name: p.clone() for name, p in self._live.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the parameters after update ``step`` (0-based)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._mean.values()), list(self._live.values()), 1 - decay)

    @torch.no_grad()
    def state_dict(self, *, empty: bool = False) -> dict[str, Tensor]:
        """Return the averages, whole and on the CPU; every process must call this.

        Args:
            empty: whether to take part in the exchange only and return nothing: for all processes but the one that
                writes.
        """
        state = {}
        for name, mean in self._mean.items():
            whole = mean.full_tensor() if isinstance(mean, DTensor) else mean
            if not empty:
                state[name] = whole.cpu()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the averages by those of ``state``, which every process has whole.

        Raises:
            KeyError: ``state`` lacks a parameter.
        """
        for name, mean in self._mean.items():
            whole = state[name].to(mean.device)
            if isinstance(mean, DTensor):
                whole = distribute_tensor(whole, mean.device_mesh, mean.placements, src_data_rank=None)
            mean.copy_(whole)
