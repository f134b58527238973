"""The official InnerControl align model: what its payload means for an ``InnerControlProbe``.

Layout, from the official code: ``config`` (``dims``, ``projection_dim``, ``save_timestep``, ``aggregation_kwargs``)
and ``aggregation_network``, the state dict. Files of Readout Guidance share it and also record ``dataset_args`` and
``model_id``. Nothing in the file says which condition it reads, and its taps only show in the sum of its dims.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from icexport.errors import CheckpointError, UsageError
from icexport.models.checkpoint import state_problems
from icexport.models.probe import InnerControlProbe, Normaliser, ProbeConfig, TimestepConvention
from icexport.models.taps import TapKind

# What InnerControl's alignment loss applies to the readings of its published align models; to others, nothing.
NORMALISERS: Mapping[str, Normaliser] = {"depth": "max", "lineart": "minmax_inverted"}
# Sum of the dims -> the kinds of taps with this sum, and the UNet that has them.
_BACKBONES: Mapping[int, Mapping[TapKind, str]] = {
    10560: {"conv": "SD 1.5"},
    5760: {"attn": "SDXL"},
    6720: {"attn": "SD 1.5", "conv": "SDXL"},
}
_POSE_CHANNELS = 18
_LAST_HEAD_LAYER = "output_head.4.weight"

# Layers of one bottleneck, and where the official network has them.
_OFFICIAL_NAMES = {
    "project": ("conv1", "shortcut"),
    "norm1": ("conv1.norm",),
    "time": ("emb_layers",),
    "conv2": ("conv2",),
    "norm2": ("conv2.norm",),
    "conv3": ("conv3",),
    "norm3": ("conv3.norm",),
    "shortcut_norm": ("shortcut.norm",),
}


def from_official(state: Mapping[str, Tensor], config: ProbeConfig) -> InnerControlProbe:
    """Build the probe from the state dict of an official align model (``aggregation_network``).

    Args:
        state: the official tensors, in any floating-point type.
        config: the config that fits it; ``unused_time_embed_dim`` stands for ``bottleneck_layers.{i}.0.`` names.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen or non-finite; all are listed.
    """
    with torch.device("meta"):
        expected = InnerControlProbe(config)
    problems = state_problems(to_official(expected), state)
    if problems:
        raise CheckpointError("The official state dict does not fit the config:\n  " + "\n  ".join(problems))
    ours = {
        name: torch.cat([state[official] for official in names]) for name, names in _official_names(expected).items()
    }
    return InnerControlProbe.from_state(config, ours, "the official state dict")


def to_official(probe: InnerControlProbe) -> dict[str, Tensor]:
    """Return the weights under the names of the official network, for its strict ``load_state_dict``.

    Raises:
        UsageError: the probe has no time layers, which the official network always has.
    """
    config = probe.config
    if config.time_embed_dim is None and config.unused_time_embed_dim is None:
        raise UsageError("This probe has no time layers: the official network cannot hold it.")
    state = probe.state_dict()
    official: dict[str, Tensor] = {}
    for name, names in _official_names(probe).items():
        rows = [config.projection_dim // 4, config.projection_dim] if len(names) == 2 else len(state[name])
        official.update(zip(names, state[name].split(rows), strict=True))
    return official


def _official_names(probe: InnerControlProbe) -> dict[str, tuple[str, ...]]:
    """Return our name of each tensor -> the official tensors that it stacks."""
    config = probe.config
    sequential = "0." if config.unused_time_embed_dim is not None else ""
    names: dict[str, tuple[str, ...]] = {}
    for name in probe.state_dict():
        if not name.startswith("bottlenecks."):
            names[name] = (name,)
            continue
        _, index, layer, parameter = name.split(".")
        official = _OFFICIAL_NAMES[layer]
        if layer == "project" and config.dims[int(index)] == config.projection_dim:
            official = ("conv1",)
        names[name] = tuple(f"bottleneck_layers.{index}.{sequential}{part}.{parameter}" for part in official)
    return names


def read_align_model(
    payload: object,
    *,
    condition: str | None,
    taps: TapKind | None,
    control_range: tuple[float, float] | None,
    timestep_convention: TimestepConvention,
    provenance: Mapping[str, str],
) -> tuple[InnerControlProbe, list[str]]:
    """Check the payload of an align model, then builds the probe.

    Args:
        payload: what the file held.
        condition: name of the condition; the payload does not record it.
        taps: kind of taps; None: as the dims or ``model_id`` tell.
        control_range: reading values (lo, hi) for 0 and 1 of the control map; None: as recorded, else (-1, 1).
        timestep_convention: to record; a network that never sees the embedding gets ``"none"``.
        provenance: to record.

    Returns:
        The probe, and a sentence for every assumption made.

    Raises:
        CheckpointError: another kind of model, or one that contradicts itself; all faults are listed.
        UsageError: condition or kind of taps must be given, or the kind contradicts the dims.
    """
    config, state = _parts(payload)
    aggregation = _mapping(config, "aggregation_kwargs")
    _refuse_other_heads(aggregation, state)
    if condition is None:
        raise UsageError("An align model does not record its condition: give its name.")
    problems, warnings = [], []

    dims = config.get("dims")
    layers, sequential, layer_problems = _layers(state, aggregation)
    problems += layer_problems
    backbone = "unknown"
    if isinstance(dims, (list, tuple)) and all(isinstance(dim, int) for dim in dims):
        taps, backbone = _resolve_taps(sum(dims), config.get("model_id"), taps)
        if len(dims) != layers:
            problems.append(f"dims: {len(dims)} taps, but the weights hold bottlenecks for {layers}.")
    steps = config.get("save_timestep", [0])
    if not isinstance(steps, (list, tuple)) or len(steps) != 1:
        problems.append(f"save_timestep: got {steps!r}, expected one entry: features of one step are read at a time.")

    recorded = _mapping(config, "dataset_args").get("control_range")
    if control_range is None and recorded is None:
        warnings.append("The file records no control_range: assumed (-1, 1), as InnerControl's loss does.")
    elif control_range is not None and recorded is not None and list(control_range) != list(recorded):
        warnings.append(f"The file records control_range {list(recorded)}: {list(control_range)} is used, as asked.")

    time_width = _time_width(state)
    try:
        probe_config = ProbeConfig(
            dims=dims,  # type: ignore[arg-type]  # ProbeConfig judges it
            projection_dim=config.get("projection_dim"),  # type: ignore[arg-type]
            num_groups=aggregation.get("num_norm_groups", 32),
            out_channels=_head_channels(aggregation, state),
            head_tanh=aggregation.get("output_head_act", True),
            time_embed_dim=None if sequential else time_width,
            unused_time_embed_dim=time_width if sequential else None,
            tap_kind=taps or "attn",
            condition=condition,
            normaliser=NORMALISERS.get(condition, "identity"),
            control_range=control_range or recorded or (-1.0, 1.0),
            timestep_convention="none" if sequential else timestep_convention,
            provenance={**provenance, "backbone": backbone},
        )
    except UsageError as error:
        problems.append(str(error))
        _refuse(problems)
    if len(probe_config.dims) == layers:
        with torch.device("meta"):
            expected = to_official(InnerControlProbe(probe_config))
        problems += state_problems(expected, state)
    if problems:
        _refuse(problems)
    return from_official(state, probe_config), warnings


def _refuse(problems: list[str]) -> NoReturn:
    raise CheckpointError("The align model contradicts itself:\n  " + "\n  ".join(problems))


def _parts(payload: object) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    keys = sorted(map(str, payload)) if isinstance(payload, Mapping) else []
    parts = [payload.get(key) if isinstance(payload, Mapping) else None for key in ("config", "aggregation_network")]
    if not all(isinstance(part, Mapping) and all(isinstance(key, str) for key in part) for part in parts):
        raise CheckpointError(
            "Not an align model: expected a dict with the dicts 'config' and 'aggregation_network', got "
            + (
                f"a dict with {', '.join(keys[:8]) or 'nothing'}."
                if isinstance(payload, Mapping)
                else f"{type(payload)}."
            )
        )
    config, state = parts
    return config, state  # type: ignore[return-value]


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _refuse_other_heads(aggregation: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    if aggregation.get("use_output_head") is False or not any(name.startswith("output_head.") for name in state):
        raise CheckpointError(
            "This is a correspondence or appearance head of Readout Guidance: it has no output_head, and compares "
            "features instead of reading a control map."
        )
    if _head_channels(aggregation, state) == _POSE_CHANNELS:
        raise CheckpointError(
            f"This is a pose-keypoint head of Readout Guidance: {_POSE_CHANNELS} heat maps, not a control map."
        )


def _head_channels(aggregation: Mapping[str, Any], state: Mapping[str, Tensor]) -> int:
    last = state.get(_LAST_HEAD_LAYER)
    found = last.shape[0] if isinstance(last, Tensor) and last.ndim else 3
    channels: int = aggregation.get("output_head_channels", found)
    return channels


def _layers(state: Mapping[str, Tensor], aggregation: Mapping[str, Any]) -> tuple[int, bool, list[str]]:
    """Return the number of bottlenecks, whether they are sequential, and what is wrong with that."""
    found = [match for name in state if (match := re.match(r"bottleneck_layers\.(\d+)\.(0\.)?", name))]
    nested = {bool(match[2]) for match in found}
    recorded = aggregation.get("bottleneck_sequential")
    problems = []
    if len(nested) > 1:
        problems.append("bottleneck_layers: some names are sequential (bottleneck_layers.0.0.), some are not.")
    elif nested and isinstance(recorded, bool) and recorded not in nested:
        problems.append(
            f"bottleneck_sequential: the config says {recorded}, the names of the weights say {not recorded}."
        )
    return len({match[1] for match in found}), True in nested, problems


def _time_width(state: Mapping[str, Tensor]) -> int:
    for name, tensor in state.items():
        if name.endswith("emb_layers.weight") and isinstance(tensor, Tensor) and tensor.ndim == 2:
            return tensor.shape[1]
    return 1280


def _resolve_taps(total: int, model_id: object, asked: TapKind | None) -> tuple[TapKind, str]:
    """Return the kind of taps, and the UNet that has them."""
    kinds = _BACKBONES.get(total, {})
    if asked:
        if kinds and asked not in kinds:
            raise UsageError(f"Taps {asked!r} cannot be: dims that sum to {total} are {' or '.join(kinds)} taps.")
        return asked, kinds.get(asked, "unknown")
    if len(kinds) > 1 and isinstance(model_id, str):
        backbone = "SDXL" if "xl" in model_id.lower() else "SD 1.5" if re.search(r"1[-.]5", model_id) else None
        kinds = {kind: name for kind, name in kinds.items() if name == backbone} or kinds
    if len(kinds) != 1:
        known = " or ".join(f"{kind} taps of {name}" for kind, name in kinds.items()) or "no UNet known here"
        raise UsageError(f"The dims sum to {total}: {known}. Give the kind of taps, attn or conv.")
    return next(iter(kinds.items()))
