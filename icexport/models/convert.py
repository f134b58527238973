"""Foreign checkpoints into safetensors folders: the only place that reads pickles.

Two kinds of input: the official InnerControl align model (one ``.pt``), which becomes an ``InnerControlProbe`` folder,
and a diffusers ControlNet folder, also as InnerControl's training leaves it (old ``.bin`` weights, fields of the
moving average in its config), which becomes a clean ControlNet folder.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from icexport.errors import CheckpointError, UsageError
from icexport.host.files import replacing, sha256
from icexport.models.align import read_align_model, to_official
from icexport.models.checkpoint import read_safetensors, state_problems
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME, InnerControlProbe, TimestepConvention
from icexport.models.taps import TapKind

logger = logging.getLogger(__name__)

CONTROLNET_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_CONTROLNET_SOURCES = (CONTROLNET_WEIGHTS_NAME, "diffusion_pytorch_model.bin", "controlnet_state_dict.pt")
# An align model is 24 MB, with its optimiser state 72 MB; the ControlNet of SDXL is 5 GB.
_MAX_PROBE_BYTES = 1 << 30
_MAX_CONTROLNET_BYTES = 16 << 30
# Written by diffusers' moving average of the weights; a ControlNet has no such settings.
_EMA_FIELDS = frozenset(
    ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
)
# What the readers of zip files and pickles raise on damaged bytes.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did.

    Attributes:
        kind: what the input was.
        output: the folder that was written.
        source_sha256: hash of the weights file that was read.
        tensors: number of tensors of the network.
        values: number of values in them.
        config: the config that was written.
        warnings: assumptions made; they are logged, too.
    """

    kind: Literal["probe", "controlnet"]
    output: Path
    source_sha256: str
    tensors: int
    values: int
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def convert(
    source: Path,
    output: Path,
    *,
    cond: str | None = None,
    taps: TapKind | None = None,
    control_range: tuple[float, float] | None = None,
    timestep_convention: TimestepConvention = "true",
    force: bool = False,
) -> ConvertReport:
    """Convert an official align model or a ControlNet folder to safetensors. No code inside the input is ever run.

    Args:
        source: align model (``.pt``), or a ControlNet folder with its ``config.json``.
        output: folder to write; it appears only when complete.
        cond: condition; needed for an align model, which does not record it.
        taps: kind of taps of an align model; needed if neither its dims nor its config tell.
        control_range: reading values (lo, hi) for 0 and 1 of the control map; None: as the align model records, else
            (-1, 1) with a warning.
        timestep_convention: convention that is recorded with an align model; the official code uses it with
            ``"true"``.
        force: replace an output that ``convert`` wrote before.

    Raises:
        UsageError: arguments do not fit the input, or ``output`` exists.
        CheckpointError: the input is damaged, unsafe, inconsistent or of another kind; all faults are listed.
    """
    output = output.resolve()
    _check_output(output, force)
    if source.is_dir():
        if taps or control_range:
            raise UsageError(f"{source} is a ControlNet folder: taps and control range belong to an align model.")
        return _convert_controlnet(source, output, cond)
    if not source.is_file():
        raise UsageError(f"{source} does not exist: give an align model (.pt) or a ControlNet folder.")
    if source.suffix == ".safetensors":
        raise UsageError(
            f"{source} is safetensors already: give an align model (.pt), or a ControlNet folder as a whole."
        )
    digest = sha256(source)
    payload = _read_pickle(source, _MAX_PROBE_BYTES)
    try:
        probe, warnings = read_align_model(
            payload,
            condition=cond,
            taps=taps,
            control_range=control_range,
            timestep_convention=timestep_convention,
            provenance={"source": source.name, "source_sha256": digest},
        )
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    for warning in warnings:
        logger.warning("%s: %s", source, warning)
    _write(output, probe.save_pretrained)
    tensors = to_official(probe)
    return ConvertReport(
        "probe", output, digest, len(tensors), _values(tensors), probe.config.to_dict(), tuple(warnings)
    )


def _convert_controlnet(folder: Path, output: Path, cond: str | None) -> ConvertReport:
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}, without which its weights mean nothing: copy the one of the ControlNet "
            f"that the training began from into it, and pass the folder again."
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{config_path} is not JSON: {error}") from error
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if class_name == InnerControlProbe.__name__:
        raise UsageError(f"{folder} is a probe in icexport's own layout: nothing to convert.")
    if class_name != ControlNetModel.__name__:
        raise CheckpointError(f"{config_path}: _class_name is {class_name!r}, expected {ControlNetModel.__name__!r}.")
    weights = next((folder / name for name in _CONTROLNET_SOURCES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has no weights: expected one of {', '.join(_CONTROLNET_SOURCES)}.")
    config = {name: value for name, value in config.items() if name not in _EMA_FIELDS}
    digest = sha256(weights)
    pickled = weights.name != CONTROLNET_WEIGHTS_NAME
    state = _read_pickle(weights, _MAX_CONTROLNET_BYTES) if pickled else read_safetensors(weights)
    if not isinstance(state, dict):
        raise CheckpointError(f"{weights}: holds {type(state)}, expected a dict of tensors.")
    problems = state_problems(_controlnet_tensors(config, config_path), state)
    if problems:
        raise CheckpointError(f"{weights} does not fit {config_path}:\n  " + "\n  ".join(problems))
    metadata = {"format": "pt", "source": weights.name, "source_sha256": digest}
    if cond:
        metadata["condition"] = cond

    def fill(directory: Path) -> None:
        # Cloned: tensors of a pickle may share memory, which safetensors does not store.
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
        }
        save_file(tensors, directory / CONTROLNET_WEIGHTS_NAME, metadata=metadata)
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    _write(output, fill)
    return ConvertReport("controlnet", output, digest, len(state), _values(state), config)


def _controlnet_tensors(config: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    try:
        with torch.device("meta"):
            model = ControlNetModel.from_config(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a ControlNet: {error}") from error
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


def _read_pickle(path: Path, max_bytes: int) -> object:
    """Read tensors and plain containers from a pickle; everything else is refused before it is built."""
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):  # the layout of torch.save since 1.6: its entries could be compressed
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
        if size > max_bytes:
            raise CheckpointError(f"{path} unpacks to {size} bytes: more than {max_bytes} is not read from a pickle.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is cut short, damaged or not a checkpoint of PyTorch.") from error
        raise CheckpointError(
            f"{path} asks for {refused[1].rstrip('.')}, which is neither a tensor nor a plain container; reading it "
            f"could run code, so it is refused. If you trust its origin, open it in a sandbox, turn its config into "
            f"plain dicts and lists, save 'config' and 'aggregation_network' alone with torch.save, and convert that."
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is cut short, damaged or not a checkpoint of PyTorch: {error}") from error


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output} exists: choose another output, or pass force to replace it.")
    ours = {CONFIG_NAME, WEIGHTS_NAME, CONTROLNET_WEIGHTS_NAME}
    if not output.is_dir() or not ours.issuperset(path.name for path in output.iterdir()):
        raise UsageError(f"{output} holds more than a conversion writes: it is not replaced. Choose another output.")


def _write(output: Path, fill: Callable[[Path], None]) -> None:
    """Fill a sibling folder, then put it in the place of ``output``: no half output is ever seen."""
    try:
        with replacing(output) as folder:
            fill(folder)
    except OSError as error:
        raise CheckpointError(f"Could not write {output}: {error}. What was there before is untouched.") from error


def _values(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
