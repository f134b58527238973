"""Loading extractor weights safely: no pickled code, and every mismatch named at once."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from icexport.errors import ConditionError


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, or of a torch file (``weights_only``: it cannot run code).

    Raises:
        ConditionError: if the file is missing or cannot be read as such.
    """
    if not path.is_file():
        raise ConditionError(f"The weights {path} do not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConditionError(f"The weights {path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ConditionError(f"The weights {path} hold a {type(state).__name__}; expected a state dict.")
    return state


def load_state(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load ``state`` into ``network`` strictly, then freeze it for inference.

    Raises:
        ConditionError: if tensors are missing, unexpected or of another shape; all are listed.
    """
    expected = network.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    other_shape = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(other_shape)}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ConditionError(f"{path} does not hold the weights of {type(network).__name__}. Tensors {listed}.")
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
