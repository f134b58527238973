"""What the loaders of weights share: safetensors, pickles, and judging a state dict. No pickle is read elsewhere."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
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


MAX_PICKLE_BYTES = 16 << 30
"""Most that is read from a pickle: the ControlNet of SDXL is 5 GB, a base model with its moving average 8 GB."""

# What the readers of zip files and pickles raise on damaged bytes.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def read_pickle(path: Path, max_bytes: int | None = None, *, mapped: bool = False) -> object:
    """Read tensors and plain containers from a pickle; everything else is refused before it is built.

    Args:
        path: path of the file.
        max_bytes: most bytes that it may unpack to; None: ``MAX_PICKLE_BYTES``.
        mapped: whether tensors may be views of the file, which then takes no memory until they are read.

    Raises:
        CheckpointError: it is missing, damaged, too large, or asks for anything else.
    """
    limit = MAX_PICKLE_BYTES if max_bytes is None else max_bytes
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):  # the layout of torch.save since 1.6: its entries could be compressed
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            size = max(size, sum(entry.file_size for entry in entries))
            mapped = mapped and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        else:
            mapped = False
        if size > limit:
            raise CheckpointError(f"{path} unpacks to {size} bytes: more than {limit} is not read from a pickle.")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is cut short, damaged or not a checkpoint of PyTorch.") from error
        raise CheckpointError(
            f"{path} asks for {refused[1].rstrip('.')}, which is neither a tensor nor a plain container; reading it "
            "could run code, so it is refused. If you trust its origin, open it in a sandbox, and save its tensors, "
            "with settings as plain dicts and lists, by torch.save."
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is cut short, damaged or not a checkpoint of PyTorch: {error}") from error


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
