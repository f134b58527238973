"""What the loaders of weights share: hub downloads, safetensors, and judging a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from icexport.errors import CheckpointError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    The tensors are views of the mapped file: clone those that must outlive a change of the file.

    Raises:
        CheckpointError: the file is missing, cut short or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {error}. The file is missing, cut short or damaged: copy or download it again."
        ) from error


def download(
    repo: str,
    file: str,
    *,
    subfolder: str = "",
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch one file of a Hugging Face Hub repository, or finds it in the cache.

    Raises:
        CheckpointError: the repository or file does not exist or cannot be reached.
    """
    try:
        return Path(
            hf_hub_download(
                repo,
                file,
                subfolder=subfolder or None,
                token=token,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repo!r} is not a folder, and {file} could not be fetched from a Hub repository of that name: {error}"
        ) from error


def state_problems(expected: Mapping[str, Tensor], found: Mapping[str, object]) -> list[str]:
    """List every way in which a state dict does not fit: names, types, shapes, non-finite values.

    Args:
        expected: tensors with the right names and shapes, for example on the meta device.
        found: what to judge. Values are looked at only where the shape is right.

    Returns:
        One line per fault, sorted; empty if ``found`` fits.
    """
    problems = [f"{name}: missing, expected {list(expected[name].shape)}." for name in expected.keys() - found.keys()]
    problems += [f"{name}: unexpected." for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        tensor, shape = found[name], list(expected[name].shape)
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            problems.append(f"{name}: not a dense tensor of 16, 32 or 64-bit floating-point values.")
        elif list(tensor.shape) != shape:
            problems.append(f"{name}: shape {list(tensor.shape)}, expected {shape}.")
        elif tensor.is_meta or not tensor.isfinite().all():
            problems.append(f"{name}: holds no values, NaN or infinite ones.")
    return sorted(problems)
