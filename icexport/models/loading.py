"""Models from folders and the Hugging Face Hub: found, hashed, and loaded strictly, one component at a time."""

from __future__ import annotations

import inspect
import json
import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from icexport.errors import CheckpointError, UsageError
from icexport.host.files import Hashes
from icexport.models.family import FAMILIES, Family, family_of
from icexport.reference import reference_path

if TYPE_CHECKING:  # a cache hit of ``build`` hashes files and must not pay for these imports
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

    from icexport.models.probe import InnerControlProbe

logger = logging.getLogger(__name__)

REFERENCE = "reference"
_WEIGHTS = ("*.safetensors", "*.json", "*.txt")


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of one controlled model lie on this disk.

    Attributes:
        condition: name of the condition.
        model: base model as given: ``reference``, a folder or a Hub id.
        controlnet: ControlNet as given; None: ``controlnet-<condition>`` in the base model's folder.
        probe: probe as given; None: ``probe-<condition>`` in the base model's folder; ``none``: no probe.
        family: what kind of model it is.
        base: the base model's folder.
        controlnet_folder: the ControlNet's folder.
        probe_folder: the probe's folder, or None for a bundle without a probe.
        hashes: hashes of files that are known already.
    """

    condition: str
    model: str
    controlnet: str | None
    probe: str | None
    family: Family
    base: Path = field(repr=False)
    controlnet_folder: Path = field(repr=False)
    probe_folder: Path | None = field(repr=False)
    hashes: Hashes = field(default_factory=Hashes, repr=False, compare=False)

    @classmethod
    def find(cls, condition: str, model: str, controlnet: str | None = None, probe: str | None = None) -> ModelSource:
        """Locate all parts, downloading from the Hub what is named by an id.

        Raises:
            UsageError: a ControlNet or probe must be named: the base model's folder has none for this condition.
            CheckpointError: a folder is not what it should be, or a download failed.
        """
        base, family = find_base(model)
        controlnet_folder = locate(controlnet) if controlnet else base / f"controlnet-{condition}"
        probe_folder = None
        if probe != "none":
            probe_folder = locate(probe) if probe else base / f"probe-{condition}"
        for option, given, folder in (
            ("--controlnet", controlnet, controlnet_folder),
            ("--probe", probe, probe_folder),
        ):
            if folder is not None and not (folder / "config.json").is_file():
                where = f"{folder} has no config.json" if given else f"{base} has no folder {folder.name}"
                hint = " (or --probe none for a bundle without fidelity readings)" if option == "--probe" else ""
                raise UsageError(f"No {option[2:]} for {condition!r}: {where}. Give {option} FOLDER_OR_HUB_ID{hint}.")
        return cls(condition, model, controlnet, probe, family, base, controlnet_folder, probe_folder)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Every file that the bundle depends on, by ``part/file``."""
        folders = {part: self.base / part for part in self.family.parts}
        folders["controlnet"] = self.controlnet_folder
        if self.probe_folder is not None:
            folders["probe"] = self.probe_folder
        return {
            f"{part}/{path.name}": path
            for part, folder in folders.items()
            for path in sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern))
        }

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
            CheckpointError: the config is missing or no JSON object.
        """
        path = (
            self.base / "scheduler" / "scheduler_config.json"
            if part == "scheduler"
            else self._weighty[part] / "config.json"
        )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}.") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} holds no JSON object.")
        return config

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

    @property
    def _weighty(self) -> dict[str, Path]:
        """Folders of the parts that have weights."""
        folders = {part: self.base / part for part in ("unet", "vae", "text_encoder")}
        folders["controlnet"] = self.controlnet_folder
        return folders | ({} if self.probe_folder is None else {"probe": self.probe_folder})

    def elements(self) -> dict[str, int]:
        """Return the number of weights of each part, from the headers of its files.

        Raises:
            CheckpointError: a file is damaged or cut short; every such file is named.
        """
        counts, problems = dict.fromkeys(self._weighty, 0), []
        for part, path in ((p, f) for p, folder in self._weighty.items() for f in folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    counts[part] += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:  # noqa: PERF203  all damaged files are listed
                problems.append(f"{path} ({error})")
        if problems:
            raise CheckpointError(f"Damaged or cut short: {'; '.join(problems)}. Copy or download again.")
        return counts

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Return the UNet; like all of these, on the CPU, frozen, and checked key by key."""
        return load_unet(self.base / "unet", dtype)

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Return the autoencoder; see ``unet``."""
        return load_vae(self.base / "vae", dtype)

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        """Return the text encoder; see ``unet``."""
        return load_text_encoder(self.base / "text_encoder", dtype)

    def controlnet_model(self, dtype: torch.dtype) -> ControlNetModel:
        """Return the ControlNet; see ``unet``."""
        return load_controlnet(self.controlnet_folder, dtype)

    def probe_model(self, dtype: torch.dtype) -> InnerControlProbe | None:
        """Return the probe; None: the bundle has none."""
        return None if self.probe_folder is None else load_probe(self.probe_folder, dtype)

    def tokenizer(self) -> CLIPTokenizer:
        """Return the tokenizer of the text encoder."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.base / "tokenizer")  # type: ignore[no-any-return]


def _defaults(part: str) -> dict[str, Any]:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig

    if part == "text_encoder":
        return CLIPTextConfig().to_dict()
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}
    parameters = inspect.signature(classes[part].__init__).parameters if part in classes else {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def find_base(model: str) -> tuple[Path, Family]:
    """Return the folder and family of a base model.

    Args:
        model: the base model: ``reference``, a folder or a Hub id.

    Raises:
        CheckpointError: the model cannot be had, or lacks files.
    """
    base = reference_path() if model == REFERENCE else locate(model, _all_parts())
    family = family_of(_pipeline_class(base))
    if missing := [file for file in family.needed if not (base / file).is_file()]:
        raise CheckpointError(
            f"{base} is no folder of {family.title} as diffusers saves it: it lacks {', '.join(missing)}. Convert "
            "a single-file checkpoint with diffusers' from_single_file(...).save_pretrained(FOLDER)."
        )
    return base, family


def _all_parts() -> tuple[str, ...]:
    """Return folders that a base model of any family may have, and its index."""
    return tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts))


def _pipeline_class(base: Path) -> str | None:
    """Return the pipeline that a folder was saved by, if it says so."""
    try:
        index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not every folder has one, and nothing else of it is used
        return None
    return index.get("_class_name") if isinstance(index, dict) else None


def locate(name: str, parts: tuple[str, ...] = ()) -> Path:
    """Return a folder as it is, or the snapshot of a Hub repository with the needed files only."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name} is neither a folder nor a Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [f"{part}/{w}" for part in parts for w in _WEIGHTS] or list(_WEIGHTS)
    patterns += ["model_index.json"] if parts else []
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is not a folder here and could not be fetched from the Hub: {str(error).splitlines()[0]} Check "
            "the name and the connection, or give the path of a local folder."
        ) from error


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return a UNet of diffusers from a folder.

    Args:
        folder: folder with ``config.json`` and safetensors; nothing else is read, and no pickle.
        dtype: dtype of the weights.

    Returns:
        The model on the CPU, in evaluation mode, without gradients; so do all of these.

    Raises:
        CheckpointError: files are missing, damaged, or of another architecture; every key that does not fit is named.
    """
    from diffusers import UNet2DConditionModel

    return _load(UNet2DConditionModel, folder, dtype)


def load_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Return an autoencoder of diffusers; see ``load_unet``."""
    from diffusers import AutoencoderKL

    return _load(AutoencoderKL, folder, dtype)


def load_controlnet(folder: Path, dtype: torch.dtype) -> ControlNetModel:
    """Return a ControlNet of diffusers; see ``load_unet``."""
    from diffusers import ControlNetModel

    return _load(ControlNetModel, folder, dtype)


def load_text_encoder(folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    """Return a CLIP text encoder of transformers; see ``load_unet``."""
    from transformers import CLIPTextModel

    return _load(CLIPTextModel, folder, dtype)  # type: ignore[return-value]


def load_probe(folder: Path, dtype: torch.dtype) -> InnerControlProbe:
    """Return a probe, as ``InnerControlProbe.save_pretrained`` writes it; see ``load_unet``."""
    from icexport.models.probe import InnerControlProbe

    return InnerControlProbe.from_pretrained(folder).to(dtype).eval().requires_grad_(False)


def _load(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Call ``from_pretrained`` without its leniency: no pickles, and any key that does not fit is an error."""
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")))
    if not any(folder.glob("*.safetensors")):
        found = f"only {', '.join(pickles)}, which can hold code" if pickles else "no weights"
        raise CheckpointError(
            f"{folder} has no safetensors file; it has {found}. Convert it first: icexport convert "
            f"{folder} --output NEW."
        )
    theirs = model_class.__module__.startswith("transformers")
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "local_files_only": True}
    options["dtype" if theirs else "torch_dtype"] = dtype
    # Both libraries stop at the first tensor of a wrong shape, or hide the list: the second way is slow but tells all.
    tolerant = {"ignore_mismatched_sizes": True} | ({} if theirs else {"low_cpu_mem_usage": False})
    failures = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
    try:
        try:
            model, info = model_class.from_pretrained(folder, **options)
        except failures:
            model, info = model_class.from_pretrained(folder, **options, **tolerant)
    except failures as error:
        reason = str(error).rstrip(". ")
        raise CheckpointError(
            f"Cannot load {model_class.__name__} from {folder}: {reason}. The file is damaged, cut short, or of "
            "another architecture than its config.json says."
        ) from error
    problems = [
        f"{kind}: {', '.join(sorted(key if isinstance(key, str) else key[0] for key in info[f'{kind}_keys']))}"
        for kind in ("missing", "unexpected", "mismatched")
        if info.get(f"{kind}_keys")
    ]
    if problems:
        raise CheckpointError(f"The weights in {folder} do not fit {model_class.__name__}. {'; '.join(problems)}.")
    model.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]
