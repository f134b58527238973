"""Foreign checkpoints into safetensors folders.

The official InnerControl align model (one ``.pt``) becomes an ``InnerControlProbe`` folder; a diffusers ControlNet
folder, also as InnerControl's training leaves it (fields of the moving average in its config), a clean one. Base
models and components in any other layout that ``icexport build`` takes become folders of diffusers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from icexport.errors import CheckpointError, UsageError
from icexport.host.files import digest as digest_of
from icexport.host.files import replacing, sha256
from icexport.models import kinds
from icexport.models.align import read_align_model, to_official
from icexport.models.base_model import INDEX_NAME, find_base
from icexport.models.checkpoint import read_pickle, read_safetensors, state_problems
from icexport.models.convert_model import CONVERTED, Conversion, component, component_of_file, whole_model
from icexport.models.part import Part, read_config
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME, TimestepConvention
from icexport.models.taps import TapKind
from icexport.models.weights import PICKLES, tensor_shapes

logger = logging.getLogger(__name__)

CONTROLNET_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_MAX_PROBE_BYTES = 1 << 30  # an align model is 24 MB, with its optimiser state 72 MB
# Written by diffusers' moving average of the weights; a ControlNet has no such settings.
_EMA_FIELDS = frozenset(
    ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
)


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did.

    Attributes:
        kind: what the input was: ``probe``, ``model``, or a component such as ``controlnet``.
        output: the folder written.
        source_sha256: hash of the weights that were read; of several files, the hash of their hashes.
        tensors: number of tensors of the network.
        values: number of values in them.
        config: the config written.
        warnings: assumptions made; they are logged, too.
    """

    kind: str
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
    variant: str | None = None,
    model_config: str | None = None,
    force: bool = False,
) -> ConvertReport:
    """Convert a checkpoint to a folder of safetensors. No code inside the input is ever run.

    Args:
        source: align model (``.pt``), base model, ControlNet or autoencoder, as a folder or a single file.
        output: folder to write; it appears only when complete.
        cond: condition; needed for an align model, which does not record it.
        taps: kind of taps of an align model; needed if neither its dims nor its config tell.
        control_range: reading values (lo, hi) for 0 and 1 of the control map; None: as the align model records, else
            (-1, 1) with a warning.
        timestep_convention: recorded with an align model; the official code uses it with ``"true"``.
        variant: variant of the weights of a folder, such as ``fp16``.
        model_config: folder or Hub id with the configs that a single file lacks; None: Stable Diffusion 1's.
        force: replace an output that ``convert`` wrote before.

    Raises:
        UsageError: arguments do not fit the input, or ``output`` exists.
        CheckpointError: the input is damaged, unsafe, inconsistent or of another kind; all faults are listed.
    """
    output = output.resolve()
    _check_output(output, force)
    if not source.exists():
        raise UsageError(f"{source} does not exist: give a file of weights or a folder.")
    kind = None if source.is_dir() else kinds.kind_of_tensors(tensor_shapes(source))
    if kind is None and source.suffix in PICKLES:
        kind = kinds.ALIGN  # a damaged one, if at all: its reader can tell more
    if kind == kinds.ALIGN:
        return _convert_align(
            source,
            output,
            condition=cond,
            taps=taps,
            control_range=control_range,
            timestep_convention=timestep_convention,
        )
    if source.is_file() and (kind is None or not kind.part):
        raise UsageError(f"{source} cannot be converted: it is {kinds.explain(kind).removesuffix('.')}.")
    if taps or control_range:
        raise UsageError(f"{source} is no align model, which taps and control range belong to.")
    if source.is_dir() and _class_of(source) == kinds.CONTROLNET:
        return _convert_controlnet(source, output, cond, variant)
    conversion = _of_folder(source, variant) if kind is None else _of_file(source, kind, model_config)
    _write(output, conversion.fill)
    counts = conversion.tensors, conversion.values
    return ConvertReport(conversion.kind, output, conversion.source_sha256, *counts, conversion.config)


def _class_of(folder: Path) -> str:
    """Return which component a folder is of; empty: a base model, or nothing that is known."""
    path = folder / CONFIG_NAME
    kind = kinds.kind_of_config(read_config(path)) if path.is_file() else None
    return "" if kind is None else kind.part


def _of_folder(source: Path, variant: str | None) -> Conversion:
    name = _class_of(source)
    if name == "probe":
        raise UsageError(f"{source} is a probe in icexport's own layout: nothing to convert.")
    if name:
        return component(Part.of_folder(name, source, variant))
    if not (source / "unet").is_dir() and not (source / INDEX_NAME).is_file():
        raise CheckpointError(
            f"{source} has no {CONFIG_NAME} that says what it is. Beside the weights of a ControlNet, copy the one of "
            "the ControlNet that the training began from into it, and pass the folder again."
        )
    return whole_model(find_base(str(source), variant=variant))


def _of_file(source: Path, kind: kinds.Kind, model_config: str | None) -> Conversion:
    if kind.part == kinds.CHECKPOINT:
        return whole_model(find_base(str(source), model_config=model_config))
    found = component(component_of_file(source, kind, model_config))
    if model_config is not None:
        return found

    def fill(folder: Path) -> None:
        try:
            found.fill(folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Its config was taken to be Stable Diffusion 1's: name another one with --model-config."
            ) from error

    return replace(found, fill=fill)


def _convert_align(source: Path, output: Path, **options: Any) -> ConvertReport:
    digest = sha256(source)
    payload = read_pickle(source, _MAX_PROBE_BYTES)
    provenance = {"source": source.name, "source_sha256": digest}
    try:
        probe, warnings = read_align_model(payload, provenance=provenance, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    for warning in warnings:
        logger.warning("%s: %s", source, warning)
    _write(output, probe.save_pretrained)
    tensors = to_official(probe)
    return ConvertReport(
        "probe", output, digest, len(tensors), _values(tensors), probe.config.to_dict(), tuple(warnings)
    )


def _convert_controlnet(folder: Path, output: Path, cond: str | None, variant: str | None) -> ConvertReport:
    part = Part.of_folder(kinds.CONTROLNET, folder, variant)
    config_path = folder / CONFIG_NAME
    files = [Path(file) for file in part.weights.files if file != part.weights.index]
    config = {name: value for name, value in part.config.items() if name not in _EMA_FIELDS}
    state: dict[str, Any] = {}
    for weights in files:
        found = read_pickle(weights) if part.weights.format == "bin" else read_safetensors(weights)
        if not isinstance(found, dict):
            raise CheckpointError(f"{weights}: holds {type(found)}, expected a dict of tensors.")
        state |= found
    hashes = {file.name: sha256(file) for file in files}
    weights, digest = files[0], hashes[files[0].name] if len(files) == 1 else digest_of(hashes)
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


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output} exists: choose another output, or pass force to replace it.")
    if not output.is_dir() or not (_is_component(output) or _is_model(output)):
        raise UsageError(f"{output} holds more than a conversion writes: it is not replaced. Choose another output.")


def _is_component(output: Path) -> bool:
    """Tell whether a folder holds nothing but what the conversion of a component writes."""
    ours = {CONFIG_NAME, WEIGHTS_NAME, CONTROLNET_WEIGHTS_NAME, "model.safetensors"}
    return ours.issuperset(path.name for path in output.iterdir())


def _is_model(output: Path) -> bool:
    """Tell whether a folder is a model that a conversion wrote."""
    return (output / INDEX_NAME).is_file() and CONVERTED in read_config(output / INDEX_NAME)


def _write(output: Path, fill: Callable[[Path], None]) -> None:
    """Fill a sibling folder, then puts it in the place of ``output``: no half output is ever seen."""
    try:
        with replacing(output) as folder:
            fill(folder)
    except OSError as error:
        raise CheckpointError(f"Could not write {output}: {error}. What was there before is untouched.") from error


def _values(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
