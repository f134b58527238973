"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-00000500/
      model.safetensors       trained parameters and buffers, under their plain names
      ema.safetensors         their averages, if there are any
      optimizer.safetensors   moments and step counters, ``<parameter>/<name>``
      state.json              step, configuration, position in the data of every process, hashes of the files above

The files are the same whether one process trained, or several with DDP or FSDP. A checkpoint appears in one go: it is
written beside its place, flushed to the disk and renamed. Until then the one before it is the newest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from icexport.errors import CheckpointError, IcexportError
from icexport.host.files import replacing, sha256

FORMAT = 1
STATE = "state.json"
_PREFIX = "step-"
_QUANTISED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds.

    Attributes:
        path: the checkpoint's folder.
        tensors: tensors by file (``model``, ``ema``, ``optimizer``) and name, on the CPU.
        state: the rest of the checkpoint.
    """

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: folder of all checkpoints; need not exist.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def paths(self) -> list[Path]:
        """Return every checkpoint, the newest last."""
        return sorted(p for p in self.folder.glob(f"{_PREFIX}*") if p.is_dir())

    def last_good(self) -> str:
        """Return a sentence that says where a stopped run would go on."""
        paths = self.paths()
        return f"The last good checkpoint is {paths[-1]}." if paths else "There is no checkpoint yet."

    def write(self, step: int, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``, then remove those that are no longer kept.

        Args:
            step: number of updates so far.
            tensors: tensors by file and name; a file without any is left out.
            state: the rest of the checkpoint, JSON-able.

        Raises:
            IcexportError: the disk is full or refuses; older checkpoints are as they were.
        """
        target = self.folder / f"{_PREFIX}{step:08d}"
        try:
            with replacing(target) as folder:
                for name, content in tensors.items():
                    if content:
                        save_file(_apart(content), folder / f"{name}.safetensors")
                hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
                document = {"format": FORMAT, "step": step, **state, "sha256": hashes}
                (folder / STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
            for path in self.paths()[: -self._keep]:
                _remove(path)
        except (OSError, SafetensorError) as error:  # the second is how safetensors says that the disk is full
            raise IcexportError(
                f"The checkpoint {target} could not be written: {error}. {self.last_good()} Make room on the disk and "
                "start the same command again: training goes on from there."
            ) from error

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, or of another version of this format.
        """
        paths = self.paths()
        if not paths:
            return None
        path = paths[-1]
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            problems = [f"{name} was changed" for name, h in state["sha256"].items() if sha256(path / name) != h]
        except (OSError, ValueError, KeyError) as error:
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            before = f"from {paths[-2]}" if len(paths) > 1 else "at step 0"
            raise CheckpointError(
                f"The checkpoint {path} is damaged or incomplete ({'; '.join(problems)}). Restore it, or remove that "
                f"folder: training then starts {before}."
            )
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"The checkpoint {path} has format {state.get('format')}, and this version of icexport reads format "
                f"{FORMAT}. Go on with the version that wrote it."
            )
        return Checkpoint(path, {file.stem: load_file(file) for file in path.glob("*.safetensors")}, state)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors memory of their own, as safetensors demands: 8-bit moments share one table of quantised levels."""
    found: dict[str, Tensor] = {}
    memory = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if pointer in memory else tensor.contiguous()
        memory.add(pointer)
    return found


def _remove(folder: Path) -> None:
    """Remove ``folder``; a crash in between leaves no half of it under its name."""
    retired = folder.rename(folder.with_name(f".{folder.name}.partial-old"))
    shutil.rmtree(retired, ignore_errors=True)


def gather_model(model: nn.Module) -> dict[str, Tensor]:
    """Gather parameters and buffers under their plain names; every process must call this, the first one gets them.

    Args:
        model: the model, plain, or wrapped by DDP, ``torch.compile`` or FSDP 2.
    """
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather moments and counters, ``<parameter>/<name>``; every process must call this, the first one gets them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        f"{parameter}/{name}": torch.as_tensor(value)
        for parameter, values in state.get("state", {}).items()
        for name, value in _plain(values).items()
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Put model and optimiser back; every process must call this with the whole checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another network or optimiser.
    """
    options = StateDictOptions(full_state_dict=any(isinstance(p, DTensor) for p in model.parameters()))
    saved = checkpoint.tensors["optimizer"]
    try:
        set_model_state_dict(model, dict(checkpoint.tensors["model"]), options=options)
        state: dict[str, Any] = get_optimizer_state_dict(
            model, optimizer
        )  # of a new optimiser: right in all but values
        for parameter, values in state["state"].items():
            found = {name: (saved[f"{parameter}/{name}"], value) for name, value in _plain(values).items()}
            # Step counters are tensors in some optimisers and numbers in others.
            state["state"][parameter] = {n: s if isinstance(v, Tensor) else s.item() for n, (s, v) in found.items()}
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} does not fit the network or the optimiser that is to be trained: "
            f"{error}. Train in another output folder, or with the network that the checkpoint was made of."
        ) from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Strip one parameter's state of the extra level that bitsandbytes puts its moments in, and does not need back."""
    return {name: value for name, value in values.items() if name != _QUANTISED} | dict(values.get(_QUANTISED, {}))
