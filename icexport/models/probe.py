"""The probe: a small convolutional network that reads the control map back out of UNet taps.

Numerically the official InnerControl ``AggregationNetwork``, evaluated in another order. The official network resizes
every tap to the output size, then applies two 1x1 convolutions to it. A 1x1 convolution commutes with a bilinear
resize, so here each tap goes through one stacked 1x1 convolution at its own resolution, and only its few outputs are
resized: half the FLOPs, and no concatenation of thousands of channels at full size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from icexport.errors import CheckpointError, UsageError
from icexport.models.checkpoint import download, read_safetensors, state_problems
from icexport.models.taps import TapKind

Normaliser = Literal["identity", "max", "minmax_inverted"]
TimestepConvention = Literal["true", "mirrored", "none"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "probe.safetensors"


@dataclass(frozen=True)
class ProbeConfig:
    """What a probe reads, how it is built and what its reading means.

    Attributes:
        dims: channels of each tap, coarse to fine.
        projection_dim: channels P of the aggregated map; the bottlenecks work at P / 4.
        num_groups: groups of every GroupNorm; divides P / 4.
        head_dims: channels of the 3x3 convolutions of the head.
        out_channels: channels of the reading.
        head_tanh: whether the head ends in Tanh, which bounds the reading to [-1, 1].
        time_embed_dim: width of the UNet's time embedding; None: the probe is not conditioned on the timestep.
        unused_time_embed_dim: only for official files with ``bottleneck_sequential``: they hold time layers of this
            width that their network never runs. Kept so that ``align.to_official`` gives back the whole file.
        tap_kind: which taps the probe reads.
        output_scale: size of the reading over the size of the finest tap.
        condition: name of the condition that the probe reads; None: not known.
        normaliser: what a consumer applies to the reading, mapped to [0, 1], before comparing it with
            ``icexport.fidelity.normalise.control_target`` of the control map: ``"identity"``; ``"max"``: mean over
            channels, divided by the maximum of the picture; ``"minmax_inverted"``: mean over channels, min-max of the
            picture, then 1 - x.
        control_range: reading values (lo, hi) that stand for 0 and 1 of the control map: x -> (x - lo) / (hi - lo).
        timestep_convention: which timestep's embedding the probe was made for: ``"true"``: the UNet's t;
            ``"mirrored"``: T - t, for a noise schedule of T steps; ``"none"``: any.
        provenance: free text about the origin, for example the SHA-256 of the source file.

    Raises:
        UsageError: fields do not fit together; all faults are listed.

    Source: InnerControl (arXiv 2507.02321); defaults are those of its released probes.
    """

    dims: tuple[int, ...]
    projection_dim: int = 384
    num_groups: int = 32
    head_dims: tuple[int, ...] = (128, 32)
    out_channels: int = 3
    head_tanh: bool = True
    time_embed_dim: int | None = 1280
    unused_time_embed_dim: int | None = None
    tap_kind: TapKind = "attn"
    output_scale: int = 1
    condition: str | None = None
    normaliser: Normaliser = "identity"
    control_range: tuple[float, float] = (-1.0, 1.0)
    timestep_convention: TimestepConvention = "true"
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field; JSON lists are taken for tuples."""
        for name in ("dims", "head_dims", "control_range"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = self._problems()
        if problems:
            raise UsageError("Invalid probe config:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        problems = []

        def expect(name: str, fits: bool, expected: str) -> None:
            if not fits:
                problems.append(f"{name}: got {getattr(self, name)!r}, expected {expected}.")

        for name in ("dims", "head_dims"):
            value = getattr(self, name)
            fits = isinstance(value, tuple) and len(value) > 0 and all(map(_is_count, value))
            expect(name, fits, "a non-empty list of positive integers")
        for name in ("projection_dim", "num_groups", "out_channels", "output_scale"):
            expect(name, _is_count(getattr(self, name)), "a positive integer")
        if _is_count(self.projection_dim) and _is_count(self.num_groups):
            step = 4 * self.num_groups
            expect("projection_dim", self.projection_dim % step == 0, f"a multiple of 4 * num_groups = {step}")
        for name in ("time_embed_dim", "unused_time_embed_dim"):
            expect(name, getattr(self, name) is None or _is_count(getattr(self, name)), "a positive integer or null")
        if self.time_embed_dim is not None:
            expect("unused_time_embed_dim", self.unused_time_embed_dim is None, "null, because time_embed_dim is set")
        expect("head_tanh", isinstance(self.head_tanh, bool), "true or false")
        for name, choices in (
            ("tap_kind", get_args(TapKind)),
            ("normaliser", get_args(Normaliser)),
            ("timestep_convention", get_args(TimestepConvention)),
        ):
            expect(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        expect("condition", self.condition is None or isinstance(self.condition, str), "a name or null")
        limits = self.control_range
        numbers = isinstance(limits, tuple) and [type(limit) in (int, float) for limit in limits] == [True, True]
        expect("control_range", numbers and limits[0] < limits[1], "two numbers [lo, hi], lo < hi")
        texts = self.provenance.items() if isinstance(self.provenance, dict) else [(None, None)]
        expect("provenance", all(isinstance(text, str) for pair in texts for text in pair), "an object of strings")
        return problems

    @property
    def mirrored(self) -> bool:
        """Whether the probe was made for the embedding of another timestep than the UNet's."""
        return self.timestep_convention == "mirrored"

    def read_timestep(self, timestep: Tensor, train_timesteps: int) -> Tensor:
        """Return the timestep whose embedding the probe reads with, where the UNet runs at ``timestep`` of so many."""
        return train_timesteps - timestep if self.mirrored else timestep

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with ``_class_name`` as in diffusers configs."""
        return {"_class_name": InnerControlProbe.__name__, **asdict(self)}

    @classmethod
    def from_dict(cls, values: object) -> ProbeConfig:
        """Read the JSON form.

        Raises:
            UsageError: no JSON object, unknown or missing fields, another ``_class_name``, or values that do not fit.
        """
        if not isinstance(values, dict):
            raise UsageError(f"Expected a JSON object, got {type(values).__name__}.")
        rest = dict(values)
        class_name = rest.pop("_class_name", None)
        if class_name != InnerControlProbe.__name__:
            raise UsageError(f"_class_name is {class_name!r}, expected {InnerControlProbe.__name__!r}.")
        unknown = sorted(rest.keys() - {known.name for known in fields(cls)})
        if unknown:
            raise UsageError(
                f"Unknown probe config fields: {', '.join(unknown)}. A newer icexport may have written them."
            )
        if "dims" not in rest:
            raise UsageError("The probe config has no dims: the channels of each tap.")
        return cls(**rest)


class InnerControlProbe(nn.Module):
    """Reads a control map out of UNet taps, at one denoising step.

    Args:
        config: sizes of the network and the meaning of its reading.

    Source: ``AggregationNetwork`` of Diffusion Hyperfeatures (arXiv 2305.14334) as used by InnerControl (2507.02321).
    """

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        self.bottlenecks = nn.ModuleList(_Bottleneck(dim, config) for dim in config.dims)
        self.mixing_weights = nn.Parameter(torch.ones(len(config.dims)))
        layers: list[nn.Module] = []
        channels = config.projection_dim
        for width in config.head_dims:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
            channels = width
        self.output_head = nn.Sequential(*layers, nn.Conv2d(channels, config.out_channels, 1))

    def forward(self, taps: Sequence[Tensor], time_embedding: Tensor | None = None) -> Tensor:
        """Read the control map.

        Args:
            taps: one [B, dims[i], H_i, W_i] tensor per tap, coarse to fine, as ``Taps.record`` gives them.
            time_embedding: [B or 1, time_embed_dim], ``unet.time_embedding(unet.time_proj(t))``, before its SiLU. Not
                used when the config's ``time_embed_dim`` is None.

        Returns:
            [B, out_channels, output_scale * H, output_scale * W] for the last tap's H and W, in [-1, 1] with
            ``head_tanh``; ``config.control_range`` and ``config.normaliser`` say what the values mean.

        Raises:
            UsageError: taps or time embedding do not fit the config.
        """
        channels = tuple(tap.shape[1] for tap in taps)
        if channels != self.config.dims:
            raise UsageError(
                f"This probe reads {self.config.tap_kind!r} taps with {self.config.dims} channels, coarse to fine; "
                f"got {channels}. Record them with Taps(unet, {self.config.tap_kind!r}) on a UNet of the right family."
            )
        if self.config.time_embed_dim is None:
            time_embedding = None
        elif time_embedding is None or time_embedding.shape[-1] != self.config.time_embed_dim:
            got = None if time_embedding is None else tuple(time_embedding.shape)
            raise UsageError(
                f"This probe needs a time embedding [batch, {self.config.time_embed_dim}], got {got}. "
                f"Pass unet.time_embedding(unet.time_proj(timesteps))."
            )
        height, width = (side * self.config.output_scale for side in taps[-1].shape[-2:])
        weights = self.mixing_weights.softmax(0)
        weighted = (
            weight * bottleneck(tap, time_embedding, (height, width))
            for bottleneck, weight, tap in zip(self.bottlenecks, weights, taps, strict=True)
        )
        reading: Tensor = self.output_head(reduce(torch.add, weighted))
        return reading.tanh() if self.config.head_tanh else reading

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``probe.safetensors``, whose metadata repeats the config, into ``directory``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        values = self.config.to_dict()
        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt", **metadata})
        (directory / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        subfolder: str = "",
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> InnerControlProbe:
        """Load what ``save_pretrained`` wrote, in float32 on the CPU.

        Args:
            name_or_path: a folder, or the id of a Hugging Face Hub repository.
            subfolder: folder inside of it.
            token: Hub token; None: the stored one.
            revision: Hub branch, tag or commit.
            cache_dir: Hub cache.
            local_files_only: do not go to the network.

        Raises:
            CheckpointError: files are missing, damaged or do not fit each other; all faults are listed.
        """
        folder = Path(name_or_path, subfolder)
        if folder.is_dir():
            config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        else:
            config_path, weights_path = (
                download(
                    str(name_or_path),
                    file,
                    subfolder=subfolder,
                    token=token,
                    revision=revision,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
                for file in (CONFIG_NAME, WEIGHTS_NAME)
            )
        try:
            config = ProbeConfig.from_dict(json.loads(config_path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, UsageError) as error:
            raise CheckpointError(f"Cannot read the probe config {config_path}: {error}") from error
        return cls.from_state(config, read_safetensors(weights_path), str(weights_path))

    @classmethod
    def from_state(cls, config: ProbeConfig, state: Mapping[str, Tensor], source: str) -> InnerControlProbe:
        """Return a probe from its tensors, in float32 on the CPU, whatever their floating-point type.

        Args:
            config: config that fits them.
            state: tensors as ``state_dict`` gives them.
            source: where they come from, for messages.

        Raises:
            CheckpointError: tensors are missing, unexpected, misshapen or non-finite; all are listed.
        """
        # On the meta device: no time spent on initial values, and the global random state is not touched.
        with torch.device("meta"):
            probe = cls(config)
        problems = state_problems(probe.state_dict(), state)
        if problems:
            raise CheckpointError(f"{source} does not fit the probe config:\n  " + "\n  ".join(problems))
        # Copied, because safetensors maps the file: overwriting it later would change the weights.
        probe.load_state_dict(
            {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, assign=True
        )
        return probe


class _Bottleneck(nn.Module):
    """One tap [B, dim, h, w] -> [B, P, H, W]."""

    def __init__(self, dim: int, config: ProbeConfig) -> None:
        super().__init__()
        width, out, groups = config.projection_dim // 4, config.projection_dim, config.num_groups
        self.identity_shortcut = dim == out
        self.project = nn.Conv2d(dim, width if self.identity_shortcut else width + out, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        time_width = config.time_embed_dim or config.unused_time_embed_dim
        self.time = nn.Linear(time_width, width) if time_width else None
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = nn.GroupNorm(groups, out)
        self.shortcut_norm = None if self.identity_shortcut else nn.GroupNorm(groups, out)
        if self.time is not None:
            self.time.requires_grad_(config.time_embed_dim is not None)
        # conv1 and the shortcut are two layers, so each gets the fan-out of its own rows.
        for weight in (*self.project.weight.detach().tensor_split((width,)), self.conv2.weight, self.conv3.weight):
            if len(weight):
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")

    def forward(self, tap: Tensor, time_embedding: Tensor | None, size: tuple[int, int]) -> Tensor:
        projected = _resize(self.project(tap), size)
        width = self.norm1.num_channels
        shortcut = self.shortcut_norm(projected[:, width:]) if self.shortcut_norm else _resize(tap, size)
        hidden = self.norm1(projected[:, :width]).relu()
        if self.time is not None and time_embedding is not None:
            hidden = hidden + self.time(time_embedding).relu()[:, :, None, None]
        hidden = self.norm2(self.conv2(hidden)).relu()
        result: Tensor = (self.norm3(self.conv3(hidden)) + shortcut).relu()
        return result


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if all(map(_statically_equal, x.shape[-2:], size)):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _statically_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt):
        return a == b
    # A plain comparison of symbolic sizes would tie the exported graph to the sizes of the example.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= 1 << 20  # beyond it, sizes of weights overflow
