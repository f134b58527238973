"""Settings of a training run: preset, TOML file and command line, in this order, merged and checked as a whole.

    [model]       cond = "canny", base = "reference", controlnet, probe
    [data]        `training.data.config.DataConfig`
    [condition]   options of the condition: weights, thresholds
    [loss]        preset = "innercontrol", and any field of `training.tasks.losses.LossConfig`       (train controlnet)
    [controlnet]  `ControlNetOptions`                                                          (train controlnet)
    [probe]       `ProbeOptions`                                                               (train probe)
    [training]    `training.loop.config.TrainerConfig`
    [validation]  `training.tasks.validation.ValidationConfig`                                       (train controlnet)

TOML has no null: a number that may be None is ``"none"`` then.
"""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from icexport import conditions
from icexport.conditions import Condition
from icexport.errors import UsageError
from icexport.models.base_model import REFERENCE
from icexport.models.probe import TimestepConvention
from icexport.models.taps import TapKind
from training.data.config import DataConfig
from training.loop.trainer import TrainerConfig
from training.presets import Preset, preset
from training.tasks.losses import LossConfig
from training.tasks.validation import ValidationConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, dict[str, Any]]
T = TypeVar("T")

PROBE_TRAINING = {"steps": 5000, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0, "ema_decay": None}
"""Readout Guidance's recipe for its spatial heads."""

_FLAGS = {"model.cond": "--cond", "data.source": "--data"}
_COMMON = ("model", "data", "condition", "training")


@dataclass(frozen=True)
class ModelConfig:
    """Which networks take part.

    Attributes:
        cond: name of the condition.
        base: the frozen base model: ``reference``, a folder or a Hub id.
        controlnet: folder or Hub id of a ControlNet: where its own training starts, or what runs beside a probe in
            training. ``scratch`` (``none`` for a probe's training): none. None: the base model's own
            ``controlnet-<cond>``, else, for ControlNets, the preset's.
        probe: folder or Hub id of a probe: what the alignment reads with, or where its own training starts. None: the
            base model's own ``probe-<cond>``, or a new one.
    """

    cond: str
    base: str = REFERENCE
    controlnet: str | None = None
    probe: str | None = None


@dataclass(frozen=True)
class ControlNetOptions:
    """How a ControlNet trains.

    Attributes:
        text_dropout: probability that a sample's prompt is the empty one.
        gradient_checkpointing: whether to compute the ControlNet's activations twice instead of keeping them.
    """

    text_dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        _check_shares(text_dropout=self.text_dropout)


@dataclass(frozen=True)
class ProbeOptions:
    """How a probe is made and trains. The sizes count for new probes; None: as `training.tasks.probe.new_probe`.

    Attributes:
        taps: which activations it reads.
        control_share: part of the batches that run UNet and ControlNet; the others run the plain UNet.
        balanced: whether to weigh background and the rest alike, for sparse edges.
        text_dropout: probability that a sample's prompt is the empty one.
        timestep_convention: which timestep's embedding it is given.
        control_range: the probe's values for 0 and 1 of the control map.
        projection_dim: number of channels of the aggregated map.
        num_groups: number of groups of the probe's norms.
        head_dims: numbers of channels of the probe's head.
        output_scale: size of the reading over that of the finest tap.
        leak_data: where the pictures of the leak test come from, as the training data's ``source``; None: from there.
        leak_pictures: how many pictures of the leak test, the first ones; 0: no leak test.
    """

    taps: TapKind = "attn"
    control_share: float = 0.5
    balanced: bool = False
    text_dropout: float = 0.0
    timestep_convention: TimestepConvention = "true"
    control_range: tuple[float, float] = (-1.0, 1.0)
    projection_dim: int | None = None
    num_groups: int | None = None
    head_dims: tuple[int, ...] | None = None
    output_scale: int | None = None
    leak_data: str | None = None
    leak_pictures: int = 32

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_shares(control_share=self.control_share, text_dropout=self.text_dropout)

    @property
    def sizes(self) -> dict[str, Any]:
        """What ``new_probe`` is to build other than by default."""
        names = ("projection_dim", "num_groups", "head_dims", "output_scale", "timestep_convention", "control_range")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class ControlNetRun:
    """Everything that one ``train controlnet`` is determined by.

    Attributes:
        own_size: whether the pictures' size is the base model's, because ``data.resolution`` is not given.
    """

    model: ModelConfig
    condition: Condition
    data: DataConfig
    own_size: bool
    preset: Preset
    loss: LossConfig
    controlnet: ControlNetOptions
    training: TrainerConfig
    validation: ValidationConfig


@dataclass(frozen=True)
class ProbeRun:
    """Everything that one ``train probe`` is determined by; ``own_size`` as in `ControlNetRun`."""

    model: ModelConfig
    condition: Condition
    data: DataConfig
    own_size: bool
    probe: ProbeOptions
    training: TrainerConfig


def controlnet_run(file: Path | None, options: Tables) -> ControlNetRun:
    """Return the settings of ``train controlnet``.

    Args:
        file: TOML file, or None.
        options: what the command line says; counts more than the file, which counts more than the preset.

    Raises:
        UsageError: a key is unknown, or a type or value is wrong; all of them are listed.
    """
    tables = merge(_read(file), options)
    loss = tables.setdefault("loss", {})
    chosen = preset(str(loss.pop("preset", "innercontrol")), _condition(tables))
    tables = merge({"loss": asdict(chosen.loss), "training": dict(chosen.training)}, tables)
    checked = _Checked(tables, (*_COMMON, "loss", "controlnet", "validation"))
    parts = {
        **_common(checked, tables),
        "preset": chosen,
        "loss": checked("loss", LossConfig),
        "controlnet": checked("controlnet", ControlNetOptions),
        "validation": checked("validation", ValidationConfig),
    }
    checked.finish()
    return ControlNetRun(**parts)


def probe_run(file: Path | None, options: Tables) -> ProbeRun:
    """Return the settings of ``train probe``; as `controlnet_run`."""
    tables = merge({"training": dict(PROBE_TRAINING)}, merge(_read(file), options))
    _condition(tables)
    checked = _Checked(tables, (*_COMMON, "probe"))
    parts = {**_common(checked, tables), "probe": checked("probe", ProbeOptions)}
    checked.finish()
    return ProbeRun(**parts)


def assignments(texts: Sequence[str]) -> Tables:
    """Return what ``--set SECTION.KEY=VALUE`` says; values are TOML's, or else text.

    Raises:
        UsageError: a text has another form.
    """
    tables: Tables = {}
    for text in texts:
        name, _, value = text.partition("=")
        section, _, key = name.strip().partition(".")
        if not (section and key and value.strip()):
            raise UsageError(f"--set {text}: expected SECTION.KEY=VALUE, for example training.ema_decay=0.999.")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        tables.setdefault(section, {})[key] = parsed
    return tables


def _read(file: Path | None) -> Tables:
    if file is None:
        return {}
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} is not a TOML file that can be read: {error}.") from error
    if stray := [name for name, value in tables.items() if not isinstance(value, dict)]:
        raise UsageError(f"{file}: {', '.join(stray)} belongs to no section; write it below its [section].")
    return tables


def merge(below: Tables, above: Tables) -> Tables:
    """Merge both, section by section; ``above`` counts where they differ."""
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in {**below, **above}}


def _condition(tables: Tables) -> str:
    """Find the condition's name, which has to be known before the rest can be checked; fill in its defaults."""
    model = tables.get("model", {})
    name = model.get("cond")
    if name not in conditions.names():
        got = "is missing" if name is None else f"is {name!r}"
        raise UsageError(f"The condition {got}: give --cond with one of {', '.join(conditions.names())}.")
    own = conditions.of_model(name, model.get("base", REFERENCE))
    tables["condition"] = {**asdict(own), **tables.get("condition", {})}
    return str(name)


def _common(checked: _Checked, tables: Tables) -> dict[str, Any]:
    return {
        "model": checked("model", ModelConfig),
        "condition": checked("condition", type(conditions.get(tables["model"]["cond"]))),
        "data": checked("data", DataConfig),
        "own_size": "resolution" not in tables.get("data", {}),
        "training": checked("training", TrainerConfig),
    }


class _Checked:
    """Makes dataclasses of tables and collects what is wrong with any of them, until ``finish`` tells all of it."""

    def __init__(self, tables: Tables, sections: Sequence[str]) -> None:
        self._tables = tables
        unknown = sorted(tables.keys() - set(sections))
        self._problems = [f"[{name}]: unknown section{_meant(name, sections)}" for name in unknown]

    def finish(self) -> None:
        if self._problems:
            raise UsageError("Invalid settings:\n  " + "\n  ".join(self._problems))

    def __call__(self, section: str, kind: type[T]) -> T:
        table, hints = self._tables.get(section, {}), get_type_hints(kind)
        known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
        found, values = [], {}
        for key, value in table.items():
            if key not in known:
                found.append(f"{section}.{key}: unknown{_meant(key, known)}")
                continue
            try:
                values[key] = _convert(value, hints[key])
            except TypeError:
                found.append(f"{section}.{key}: got {value!r}, expected {_words(hints[key])}")
        for key, field in known.items():
            if key not in table and field.default is MISSING and field.default_factory is MISSING:
                flag = _FLAGS.get(f"{section}.{key}")
                found.append(f"{section}.{key}: missing" + (f"; give {flag}" if flag else ""))
        made: Any = None
        if not found:
            try:
                made = kind(**values)
            except UsageError as error:
                found.append(f"[{section}]: {error}")
        self._problems += found
        return made


def _convert(value: Any, hint: Any) -> Any:
    """Return ``value``, as TOML gives it, in the type of a field.

    Raises:
        TypeError: the value has another type.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, choices)
    if origin is Literal and value in choices:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [choices[0]] * len(value) if choices[1:] == (...,) else choices
        if len(kinds) == len(value):
            return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _convert_union(value: Any, choices: tuple[Any, ...]) -> Any:
    if type(None) in choices and (value is None or (value == "none" and str not in choices)):
        return None
    for choice in choices:
        with suppress(TypeError):
            return _convert(value, choice)
    raise TypeError


def _words(hint: Any) -> str:
    """Name a type in a user's words."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, choices)))
    if origin is Literal:
        return " or ".join(map(repr, choices))
    if origin is tuple:
        count = "" if choices[1:] == (...,) else f"{len(choices)} "
        return f"a list of {count}{_words(choices[0])}s"
    names = {int: "whole number", float: "number", bool: "true or false", type(None): "'none'"}
    return names.get(hint, "text")


def _meant(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _check_shares(**shares: float) -> None:
    if faults := [f"{name} is {share}, expected 0 to 1" for name, share in shares.items() if not 0 <= share <= 1]:
        raise UsageError("; ".join(faults))
