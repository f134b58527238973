"""Base models on this disk: folders of diffusers, or single files with what they lack. Imports no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icexport.errors import CheckpointError, UsageError
from icexport.models import kinds
from icexport.models.family import FAMILIES, STABLE_DIFFUSION, Family, family_of
from icexport.models.hub import locate
from icexport.models.part import CONFIG_NAME, Part, read_config
from icexport.models.weights import SUFFIXES, tensor_shapes
from icexport.reference import reference_path

logger = logging.getLogger(__name__)

REFERENCE = "reference"
INDEX_NAME = "model_index.json"
_WEIGHTY = ("unet", "vae", "text_encoder")
_CONFIGS = Path(__file__).parent / "configs"
"""Configs of models whose single files do not bring their own, as their publishers give them."""


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        family: what kind of model it is.
        path: its folder or file.
        parts: its components with weights by name.
        folders: folders of its other components by name.
        index: what its ``model_index.json`` says.
    """

    family: Family
    path: Path
    parts: Mapping[str, Part]
    folders: Mapping[str, Path]
    index: Mapping[str, Any] = field(default_factory=dict)

    def beside(self, name: str) -> Path | None:
        """Return a folder of ControlNet or probe that lies in the model's own; None: there is none."""
        folder = self.path / name
        return folder if (folder / CONFIG_NAME).is_file() else None

    @property
    def paths(self) -> dict[str, Path]:
        """Every file that a bundle depends on, by ``part/file``."""
        found = {name: path for part in self.parts.values() for name, path in part.paths.items()}
        for name, folder in self.folders.items():
            small = (path for pattern in ("*.json", "*.txt") for path in folder.glob(pattern))
            found |= {f"{name}/{path.name}": path for path in sorted(small)}
        index = self.path / INDEX_NAME
        return found | ({INDEX_NAME: index} if index.is_file() else {})

    def scheduler_config(self) -> dict[str, Any]:
        """Return the config of the scheduler, with the class that diffusers would load.

        Two files name the class, ``model_index.json`` and the scheduler's own, and diffusers goes by the first.

        Raises:
            CheckpointError: the config is missing or no JSON object.
        """
        config = read_config(self.folders["scheduler"] / "scheduler_config.json")
        named = self.index.get("scheduler")
        if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
            config["_class_name"] = named[1]
        return config

    def tokenizer_config(self) -> dict[str, Any]:
        """Return the config of the tokenizer.

        Raises:
            CheckpointError: the config is missing or no JSON object.
        """
        return read_config(self.folders["tokenizer"] / "tokenizer_config.json")


def find_base(
    model: str, *, vae: str | None = None, variant: str | None = None, model_config: str | None = None
) -> BaseModel:
    """Return a base model.

    Args:
        model: ``reference``, a folder, a single file or a Hub id.
        vae: autoencoder in place of the model's own: a folder, a single file or a Hub id.
        variant: variant of the weights, for the parts that have it.
        model_config: folder or Hub id with configs and tokenizer of a single file; None: those of Stable Diffusion 1.

    Raises:
        CheckpointError: the model cannot be had, is damaged or lacks files.
        UsageError: it is a model of another kind, or the variant is not there.
    """
    path = reference_path() if model == REFERENCE else locate(model, _all_parts(), variant)
    if path.is_dir():
        if model_config is not None:
            raise UsageError(f"{model} is a folder, which has its own configs: --model-config is for single files.")
        base = _of_folder(path, variant)
    else:
        base = _of_file(path, model_config)
    if vae is None:
        return base
    return BaseModel(
        base.family, base.path, {**base.parts, "vae": _other_vae(vae, base, variant)}, base.folders, base.index
    )


def _of_folder(path: Path, variant: str | None) -> BaseModel:
    index = _index(path)
    name = index.get("_class_name")
    family = family_of(name)
    _check_kind(path, name if isinstance(name, str) else "", family)
    if missing := [file for file in family.needed if not (path / file).is_file()]:
        raise CheckpointError(
            f"{path} is no folder of {family.title} as diffusers saves it: it lacks {', '.join(missing)}."
        )
    for part in _WEIGHTY:
        _check_class(path, index, part)
    parts = _parts(path, [part for part in _WEIGHTY if part in family.parts], variant)
    folders = {part: path / part for part in family.parts if part not in _WEIGHTY and (path / part).is_dir()}
    return BaseModel(family, path, parts, folders, index)


def _parts(path: Path, names: list[str], variant: str | None) -> dict[str, Part]:
    """Return the components with weights; those that lack the variant give their plain weights, as in diffusers."""
    parts = {name: Part.of_folder(name, path / name, variant) for name in names}
    lacking = [name for name, part in parts.items() if part.weights.variant != variant]
    if variant is not None and len(lacking) == len(names):
        raise UsageError(
            f"--variant {variant}: {path} has no weights of this variant. Leave it out, or choose another."
        )
    if variant is not None and lacking:
        logger.warning(
            "%s has no weights of variant %r for %s: others are read.", path, variant, " and ".join(lacking)
        )
    return parts


def _check_kind(path: Path, pipeline: str, family: Family) -> None:
    """Refuse what is known to be something else, by its name."""
    kind = kinds.kind_of_class(pipeline) if pipeline not in family.pipelines else None
    if kind is None and not (path / "unet").is_dir():
        config = path / CONFIG_NAME
        if config.is_file():
            kind = kinds.kind_of_config(read_config(config))
        elif (path / "icexport.json").is_file():
            kind = kinds.Kind("a bundle of icexport, which needs no build", way_out="Draw with it: icexport generate.")
        elif (path / "transformer").is_dir():
            kind = kinds.Kind("a model with a transformer", way_out="icexport builds Stable Diffusion 1 and 2.")
        else:
            files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else []
            kind = kinds.kind_of_tensors(tensor_shapes(files[0])) if len(files) == 1 else None
            if kind is not None and kind.part == kinds.CHECKPOINT:
                raise UsageError(f"{path} is a folder with a single-file model: give the file, {files[0]}.")
    if kind is not None:
        raise UsageError(f"{path} is no base model: it is {kinds.explain(kind).removesuffix('.')}.")


def _check_class(path: Path, index: Mapping[str, Any], part: str) -> None:
    """Refuse a component that ``model_index.json`` loads by another class than its config says."""
    named = index.get(part)
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    if isinstance(name, str) and not kinds.fits(part, {"_class_name": name}):
        raise UsageError(f"{path / INDEX_NAME} gives {part} as a {name}, which icexport does not build.")


def _index(path: Path) -> dict[str, Any]:
    """Return the index of a folder; empty if it has none: not every folder does."""
    try:
        index = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _of_file(file: Path, model_config: str | None) -> BaseModel:
    """Return the model in a single file; configs and tokenizer come from elsewhere."""
    shapes = tensor_shapes(file)
    kind = kinds.kind_of_tensors(shapes)
    if kind is None or kind.part != kinds.CHECKPOINT:
        raise UsageError(f"{file} is no base model: it is {kinds.explain(kind).removesuffix('.')}.")
    absent = [part for part, prefix in kinds.LDM_PREFIXES.items() if not any(n.startswith(prefix) for n in shapes)]
    if absent:
        raise UsageError(f"{file} is no whole base model: it has no {' and no '.join(absent)}.")
    if model_config is not None:
        configs = locate(model_config)
        tokenizer = configs / "tokenizer"
        if not configs.is_dir():
            raise UsageError(f"--model-config {model_config} is no folder with configs.")
    else:
        configs = _configs_of(file, shapes)
        tokenizer = reference_path() / "tokenizer"  # that of CLIP, as Stable Diffusion 1 has it
    parts = {
        name: Part.of_file(
            name,
            file,
            read_config(configs / name / CONFIG_NAME),
            configs / name / CONFIG_NAME,
            kinds.LDM_PREFIXES[name],
        )
        for name in _WEIGHTY
    }
    folders = {"tokenizer": tokenizer, "scheduler": configs / "scheduler"}
    return BaseModel(STABLE_DIFFUSION, file, parts, folders, _index(configs))


_TEXT_WIDTH = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def _configs_of(file: Path, shapes: kinds.Shapes) -> Path:
    if shapes.get(_TEXT_WIDTH) != (320, 768):
        raise UsageError(
            f"{file} is not of Stable Diffusion 1's size, and a single file does not bring its configs. Give a folder "
            "or Hub id that has them, with the tokenizer: --model-config FOLDER_OR_HUB_ID."
        )
    return configs_of_stable_diffusion_1()


def configs_of_stable_diffusion_1() -> Path:
    """Return the folder of the configs of Stable Diffusion 1, as diffusers lays them out."""
    return _CONFIGS / "stable-diffusion-1"


def _other_vae(vae: str, base: BaseModel, variant: str | None) -> Part:
    """Return an autoencoder that is not the model's own; a single file has the config of the model's."""
    path = locate(vae, (), variant)
    if path.is_dir():
        return Part.of_folder("vae", path, variant)
    kind = kinds.kind_of_tensors(tensor_shapes(path))
    if kind is None or kind.part not in (kinds.VAE, kinds.CHECKPOINT):
        raise UsageError(f"{path} is no vae: it is {kinds.explain(kind).removesuffix('.')}.")
    own = base.parts["vae"]
    return Part.of_file("vae", path, own.config, own.config_path)


def _all_parts() -> tuple[str, ...]:
    """Return folders that a base model of any family may have."""
    return tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts))
