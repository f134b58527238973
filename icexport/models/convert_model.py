"""Base models and components in any layout, as folders of safetensors that diffusers reads, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from icexport.errors import UsageError
from icexport.host.files import digest, sha256
from icexport.models import kinds, loading
from icexport.models.base_model import INDEX_NAME, BaseModel, configs_of_stable_diffusion_1
from icexport.models.checkpoint import read_pickle
from icexport.models.hub import locate
from icexport.models.part import CONFIG_NAME, Part, read_config
from icexport.models.source import controlnet_config
from icexport.models.weights import tensor_shapes

CONVERTED = "_converted_from"
"""In the ``model_index.json`` of a model that ``convert`` wrote: the file or folder that it was made from."""

_LOADERS: Mapping[str, Callable[[Part | Path, torch.dtype], Any]] = {
    kinds.UNET: loading.load_unet,
    kinds.VAE: loading.load_vae,
    kinds.TEXT_ENCODER: loading.load_text_encoder,
    kinds.CONTROLNET: loading.load_controlnet,
}


@dataclass(frozen=True)
class Conversion:
    """What is to be written.

    Attributes:
        kind: what it is: ``model`` or a component.
        fill: writes it into a folder.
        source_sha256: hash of the weights that are read; of several files, the hash of their hashes.
        tensors: number of tensors.
        values: number of values in them.
        config: config of the component, or index of the model.
    """

    kind: str
    fill: Callable[[Path], None]
    source_sha256: str
    tensors: int
    values: int
    config: Mapping[str, Any]


def whole_model(base: BaseModel) -> Conversion:
    """Return the conversion of a base model: each component in the precision that it has.

    Errors are those of loading, and come when it is written.
    """
    index = {
        "_class_name": "StableDiffusionPipeline",
        CONVERTED: base.path.name,
        "scheduler": ["diffusers", base.scheduler_config()["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

    def fill(folder: Path) -> None:
        for name, part in base.parts.items():
            _save(part, folder / name)
        for name, small in base.folders.items():
            shutil.copytree(small, folder / name, copy_function=shutil.copyfile)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(base.scheduler_config(), indent=2) + "\n", encoding="utf-8")
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    parts = base.parts.values()
    files = dict.fromkeys(file for part in parts for file in part.weights.files)
    return Conversion(
        "model", fill, _hash(files), sum(_count(part) for part in parts), sum(part.elements() for part in parts), index
    )


def component(part: Part) -> Conversion:
    """Return the conversion of one component; see ``whole_model``."""
    return Conversion(
        part.name,
        lambda folder: _save(part, folder),
        _hash(dict.fromkeys(part.weights.files)),
        _count(part),
        part.elements(),
        part.config,
    )


def component_of_file(file: Path, kind: kinds.Kind, model_config: str | None) -> Part:
    """Return the ControlNet or autoencoder of a single file, whose config comes from a model's.

    Args:
        file: the file.
        kind: what it is.
        model_config: folder or Hub id of a model with configs; None: Stable Diffusion 1's.

    Raises:
        UsageError: it is of another kind.
    """
    configs = configs_of_stable_diffusion_1() if model_config is None else locate(model_config)
    if kind.part == kinds.CONTROLNET:
        config = controlnet_config(tensor_shapes(file), read_config(configs / "unet" / CONFIG_NAME))
        return Part.of_file(kinds.CONTROLNET, file, config, None)
    if kind.part == kinds.VAE:
        path = configs / "vae" / CONFIG_NAME
        return Part.of_file(kinds.VAE, file, read_config(path), path)
    raise UsageError(
        f"{file} is {kinds.explain(kind).removesuffix('.')}. Convert it as a part of its model, or in its folder."
    )


def _save(part: Part, folder: Path) -> None:
    _LOADERS[part.name](part, _dtype(part)).save_pretrained(folder)


def _count(part: Part) -> int:
    """Return the number of tensors."""
    files = [Path(file) for file in part.weights.files if file != part.weights.index]
    return sum(name.startswith(part.prefix) for file in files for name in tensor_shapes(file))


def _hash(files: Mapping[str, object]) -> str:
    hashes = {Path(file).name: sha256(Path(file)) for file in files}
    return next(iter(hashes.values())) if len(hashes) == 1 else digest(hashes)


def _dtype(part: Part) -> torch.dtype:
    """Return the dtype of the first weights of a component."""
    file = Path(next(file for file in part.weights.files if file != part.weights.index))
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            tensors = (opened.get_tensor(name) for name in opened.keys() if name.startswith(part.prefix))  # noqa: SIM118
            return _first_float(tensors)
    state: Any = read_pickle(file, mapped=True)
    while "state_dict" in state:
        state = state["state_dict"]
    return _first_float(tensor for name, tensor in state.items() if str(name).startswith(part.prefix))


def _first_float(tensors: Any) -> torch.dtype:
    found = (t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
    return next(found, torch.float32)
