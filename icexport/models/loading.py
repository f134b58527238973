"""Components loaded strictly: every tensor fits, and no code in a file is run. torch comes with the first of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from icexport.errors import CheckpointError
from icexport.models.part import CONFIG_NAME, Part
from icexport.models.weights import tensor_shapes

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

    from icexport.models.probe import InnerControlProbe

_FAILURES = (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


def load_unet(part: Part | Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return a UNet of diffusers.

    Args:
        part: the component, or its folder.
        dtype: dtype of the weights.

    Returns:
        The model on the CPU, in evaluation mode, without gradients; so do all of these.

    Raises:
        CheckpointError: files are missing, damaged, or of another architecture; every key that does not fit is named.
        UsageError: the folder is of another kind.
    """
    from diffusers import UNet2DConditionModel

    return _load(UNet2DConditionModel, "unet", part, dtype)


def load_vae(part: Part | Path, dtype: torch.dtype) -> AutoencoderKL:
    """Return an autoencoder of diffusers; see ``load_unet``."""
    from diffusers import AutoencoderKL

    return _load(AutoencoderKL, "vae", part, dtype)


def load_controlnet(part: Part | Path, dtype: torch.dtype) -> ControlNetModel:
    """Return a ControlNet of diffusers; see ``load_unet``."""
    from diffusers import ControlNetModel

    return _load(ControlNetModel, "controlnet", part, dtype)


def load_text_encoder(part: Part | Path, dtype: torch.dtype) -> CLIPTextModel:
    """Return a CLIP text encoder of transformers; see ``load_unet``."""
    from transformers import CLIPTextModel

    return _load(CLIPTextModel, "text_encoder", part, dtype)  # type: ignore[return-value]


def load_probe(part: Part | Path, dtype: torch.dtype) -> InnerControlProbe:
    """Return a probe, as ``InnerControlProbe.save_pretrained`` writes it; see ``load_unet``."""
    from icexport.models.probe import InnerControlProbe

    folder = Path(part.weights.files[0]).parent if isinstance(part, Part) else part
    return InnerControlProbe.from_pretrained(folder).to(dtype).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer of a text encoder.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]
    except _FAILURES as error:
        raise CheckpointError(f"Cannot load the tokenizer from {folder}: {error}") from error


def _load(model_class: Any, name: str, part: Part | Path, dtype: torch.dtype) -> nn.Module:
    """Load a component without the leniency of the libraries: any key that does not fit is an error."""
    if isinstance(part, Path):
        part = Part.of_folder(name, part)
    if part.weights.format == "bin":  # says what is wrong with a pickle before the libraries do
        for file in part.weights.files:
            if file != part.weights.index:
                tensor_shapes(Path(file))
    where = str(part.folder or part.weights.files[0])
    try:
        model, problems = (
            _from_folder(model_class, part, dtype) if part.folder else _from_file(model_class, part, dtype)
        )
    except _FAILURES as error:
        reason = str(error).rstrip(". ")
        raise CheckpointError(
            f"Cannot load {model_class.__name__} from {where}: {reason}. The file is damaged, cut short, or of "
            "another architecture than its config.json says."
        ) from error
    if problems:
        raise CheckpointError(f"The weights in {where} do not fit {model_class.__name__}. {'; '.join(problems)}.")
    model.eval().requires_grad_(False)
    return model


def _from_folder(model_class: Any, part: Part, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Return a model, and what does not fit."""
    theirs = model_class.__module__.startswith("transformers")
    options: dict[str, Any] = {
        "use_safetensors": part.weights.format == "safetensors",
        "variant": part.weights.variant,
        "output_loading_info": True,
        "local_files_only": True,
    }
    options["dtype" if theirs else "torch_dtype"] = dtype
    # Both libraries stop at the first tensor of a wrong shape, or hide the list: the second way is slow but tells all.
    tolerant = {"ignore_mismatched_sizes": True} | ({} if theirs else {"low_cpu_mem_usage": False})
    try:
        model, info = model_class.from_pretrained(part.folder, **options)
    except _FAILURES:
        model, info = model_class.from_pretrained(part.folder, **options, **tolerant)
    problems = [
        f"{kind}: {', '.join(sorted(key if isinstance(key, str) else key[0] for key in info[f'{kind}_keys']))}"
        for kind in ("missing", "unexpected", "mismatched")
        if info.get(f"{kind}_keys")
    ]
    return model, problems


def _from_file(model_class: Any, part: Part, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Return the model of a file in a layout of its own, and what does not fit; diffusers knows the layouts."""
    file = part.weights.files[0]
    with _config_folder(part) as folder:
        if part.name == "text_encoder":
            from diffusers import StableDiffusionPipeline

            others = ("unet", "vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
            model = StableDiffusionPipeline.from_single_file(
                file, config=str(folder), torch_dtype=dtype, local_files_only=True, **dict.fromkeys(others)
            ).text_encoder
        else:
            model = model_class.from_single_file(
                file, config=str(folder), subfolder=part.name, torch_dtype=dtype, local_files_only=True
            )
    state = model.state_dict()
    missing = sorted(name for name, tensor in state.items() if tensor.is_meta)
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    shapes = tensor_shapes(Path(file))
    if state.keys() <= shapes.keys():  # the names of diffusers, each of which has to be known
        unexpected = sorted(shapes.keys() - state.keys())
        problems += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
    return model, problems


@contextmanager
def _config_folder(part: Part) -> Iterator[Path]:
    """Make a folder with the config of one component, as diffusers looks for it."""
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / part.name).mkdir()
        (folder / part.name / CONFIG_NAME).write_text(json.dumps(dict(part.config)), encoding="utf-8")
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder
