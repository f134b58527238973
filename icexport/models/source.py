"""Where the parts of one controlled model come from: base model, ControlNet and probe, found and hashed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icexport.errors import CheckpointError, UsageError
from icexport.host.files import Hashes
from icexport.models import kinds, loading
from icexport.models.base_model import BaseModel, find_base
from icexport.models.family import Family
from icexport.models.hub import locate
from icexport.models.part import CONFIG_NAME, Part
from icexport.models.weights import tensor_shapes

if TYPE_CHECKING:  # a cache hit of ``build`` hashes files and must not pay for these imports
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from icexport.models.probe import InnerControlProbe


@dataclass(frozen=True)
class Names:
    """What a user calls the parts of a model.

    Attributes:
        model: base model: ``reference``, a folder, a single file or a Hub id.
        controlnet: ControlNet: a folder, a single file or a Hub id; None: ``controlnet-<condition>`` in the base
            model's folder.
        probe: probe: a folder or a Hub id; None: ``probe-<condition>`` in the base model's folder; ``none``: no probe.
        vae: autoencoder, as a ControlNet; None: the base model's.
        variant: variant of the weights, such as ``fp16``; None: the weights without one, or the only variant.
        model_config: folder or Hub id with the configs and the tokenizer of a single-file model; None: those of
            Stable Diffusion 1.
    """

    model: str
    controlnet: str | None = None
    probe: str | None = None
    vae: str | None = None
    variant: str | None = None
    model_config: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """The parts of one controlled model on this disk.

    Attributes:
        condition: name of the condition.
        names: what the user called the parts.
        base: the base model.
        controlnet: the ControlNet.
        probe: the probe; None: the bundle has none.
        hashes: hashes of files that are known already.
    """

    condition: str
    names: Names
    base: BaseModel = field(repr=False)
    controlnet: Part = field(repr=False)
    probe: Part | None = field(repr=False)
    hashes: Hashes = field(default_factory=Hashes, repr=False, compare=False)

    @classmethod
    def find(
        cls, condition: str, model: str, controlnet: str | None = None, probe: str | None = None, **more: Any
    ) -> ModelSource:
        """Locate all parts, downloading from the Hub what is named by an id.

        Args:
            condition: name of the condition.
            model: see ``Names``, as the following ones.
            controlnet: ControlNet.
            probe: probe.
            **more: the other fields of ``Names``.

        Raises:
            UsageError: a ControlNet or probe must be named: the base model's folder has none for this condition; or a
                part is of another kind.
            CheckpointError: a part is not what it should be, or a download failed.
        """
        names = Names(model, controlnet, probe, **more)
        base = find_base(model, vae=names.vae, variant=names.variant, model_config=names.model_config)
        net = controlnet_of(_place(base, "controlnet", condition, controlnet, names.variant), base, names.variant)
        reader = None
        if probe != "none":
            reader = _probe(_place(base, "probe", condition, probe, None))
        return cls(condition, names, base, net, reader)

    @property
    def family(self) -> Family:
        """What kind of model it is."""
        return self.base.family

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Every component that has weights, by name."""
        own = {**self.base.parts, "controlnet": self.controlnet}
        return own if self.probe is None else {**own, "probe": self.probe}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Every file that the bundle depends on, by ``part/file``."""
        extra = [self.controlnet, *([] if self.probe is None else [self.probe])]
        return self.base.paths | {name: path for part in extra for name, path in part.paths.items()}

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file that the bundle depends on, by ``part/file``."""
        return {name: self.hashes(path) for name, path in self.paths.items()}

    def check_unchanged(self) -> None:
        """Refuse to go on with a model whose files have changed since they were hashed.

        Raises:
            CheckpointError: files have changed; they are named.
        """
        if changed := self.hashes.changed(self.paths.values()):
            raise CheckpointError(
                f"The model changed while it was read: {', '.join(map(str, changed))}. Nothing of it was kept. Wait "
                "until whatever writes there is done, and build again."
            )

    def config(self, part: str) -> dict[str, Any]:
        """Return a component's config as its file has it; of the scheduler, too.

        Raises:
            CheckpointError: the config of the scheduler is missing or no JSON object.
        """
        return self.base.scheduler_config() if part == "scheduler" else dict(self.parts[part].config)

    @property
    def train_timesteps(self) -> int:
        """Number of timesteps of the noise schedule."""
        return int(self.config("scheduler").get("num_train_timesteps", 1000))

    def full_config(self, part: str) -> dict[str, Any]:
        """Return a component's config with its class's defaults, which files of older versions lack. Imports classes.

        Raises:
            CheckpointError: see ``config``.
        """
        return {**_defaults(part), **self.config(part)}

    def elements(self) -> dict[str, int]:
        """Return the number of weights of each part, from the headers of its files.

        Raises:
            CheckpointError: a file is damaged or cut short; every such file is named.
        """
        counts, problems = {}, []
        for name, part in self.parts.items():
            try:
                counts[name] = part.elements()
            except CheckpointError as error:  # noqa: PERF203  all damaged files are listed
                problems.append(str(error))
        if problems:
            raise CheckpointError(" ".join(problems))
        return counts

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet; like all of these, on the CPU, frozen, and checked key by key."""
        return loading.load_unet(self.parts["unet"], dtype)

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the autoencoder; see ``unet``."""
        return loading.load_vae(self.parts["vae"], dtype)

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        """Return the text encoder; see ``unet``."""
        return loading.load_text_encoder(self.parts["text_encoder"], dtype)

    def controlnet_model(self, dtype: torch.dtype) -> ControlNetModel:
        """Return the ControlNet; see ``unet``."""
        return loading.load_controlnet(self.controlnet, dtype)

    def probe_model(self, dtype: torch.dtype) -> InnerControlProbe | None:
        """Return the probe; None: the bundle has none."""
        return None if self.probe is None else loading.load_probe(self.probe, dtype)

    def tokenizer(self) -> CLIPTokenizer:
        """Return the tokenizer of the text encoder."""
        return loading.load_tokenizer(self.base.folders["tokenizer"])


def _place(base: BaseModel, what: str, condition: str, given: str | None, variant: str | None) -> Path:
    """Return the folder or file of a ControlNet or probe.

    Raises:
        UsageError: there is none.
    """
    name = f"{what}-{condition}"
    place = locate(given, (), variant) if given else base.beside(name)
    if place is None or (place.is_dir() and not (place / CONFIG_NAME).is_file()):
        where = f"{place} has no {CONFIG_NAME}" if given else f"{base.path} has no folder {name}"
        hint = " (or --probe none for a bundle without fidelity readings)" if what == "probe" else ""
        raise UsageError(f"No {what} for {condition!r}: {where}. Give --{what} FOLDER_OR_HUB_ID{hint}.")
    return place


def controlnet_of(place: Path, base: BaseModel, variant: str | None = None) -> Part:
    """Return the ControlNet of a folder or a single file, which has the config of the base model's UNet.

    Raises:
        CheckpointError: it is damaged.
        UsageError: it is of another kind, or for another base model.
    """
    if place.is_dir():
        return Part.of_folder("controlnet", place, variant)
    shapes = tensor_shapes(place)
    kind = kinds.kind_of_tensors(shapes)
    if kind is None or kind.part != kinds.CONTROLNET:
        raise UsageError(f"{place} is no controlnet: it is {kinds.explain(kind).removesuffix('.')}.")
    unet = base.parts["unet"].config
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if widths and widths != {unet.get("cross_attention_dim")}:
        raise UsageError(
            f"{place} is a ControlNet of another base model: its text is {min(widths)} wide, and that of {base.path} "
            f"{unet.get('cross_attention_dim')} (768: Stable Diffusion 1, 1024: 2, 2048: XL)."
        )
    return Part.of_file("controlnet", place, controlnet_config(shapes, unet), None)


def _probe(place: Path) -> Part:
    if place.is_dir():
        return Part.of_folder("probe", place)
    kind = kinds.kind_of_tensors(tensor_shapes(place))
    if kind == kinds.ALIGN:
        raise UsageError(
            f"{place} is an align model as its authors save it. Convert it first: icexport convert {place} --cond "
            "NAME --output NEW."
        )
    raise UsageError(f"{place} is no probe: it is {kinds.explain(kind).removesuffix('.')}.")


_UNET_FIELDS = (
    *(
        "in_channels",
        "flip_sin_to_cos",
        "freq_shift",
        "down_block_types",
        "only_cross_attention",
        "block_out_channels",
    ),
    *("layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps"),
    *("cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("use_linear_projection", "upcast_attention", "resnet_time_scale_shift"),
)
"""What a ControlNet has from the UNet that it is a copy of the encoder of."""


def controlnet_config(shapes: kinds.Shapes, unet: Any) -> dict[str, Any]:
    """Return the config of a ControlNet that lacks one: as its UNet's encoder, with its own way to read the map.

    Args:
        shapes: shapes of its tensors, by names of diffusers or of the original.
        unet: config of the UNet.

    Raises:
        UsageError: the tensors have no way to read a control map.
    """
    names = {name.removeprefix("control_model."): shape for name, shape in shapes.items()}
    if "controlnet_cond_embedding.conv_in.weight" in names:
        first, rest = "controlnet_cond_embedding.conv_in.weight", "controlnet_cond_embedding.blocks.{}.weight"
        places = range(1, len(names), 2)
    else:
        first, rest = "input_hint_block.0.weight", "input_hint_block.{}.weight"
        places = range(4, len(names), 4)
    channels = [names[first][0]] if first in names else []
    for place in places:
        if (name := rest.format(place)) not in names:
            break
        channels.append(names[name][0])
    if not channels:
        raise UsageError("The file is no controlnet: it does not read a control map.")
    own = {name: unet[name] for name in _UNET_FIELDS if name in unet}
    return {**own, "_class_name": "ControlNetModel", "conditioning_embedding_out_channels": channels}


def _defaults(part: str) -> dict[str, Any]:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig

    if part == "text_encoder":
        return CLIPTextConfig().to_dict()
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}
    parameters = inspect.signature(classes[part].__init__).parameters if part in classes else {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}
