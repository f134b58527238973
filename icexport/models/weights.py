"""Which files of a folder hold a component's weights: what diffusers and transformers would read, and their headers.

Imports no torch, unless the header of a pickle is asked for.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from icexport.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES)
"""Suffixes of files that hold weights."""

_STEMS = {
    "diffusers": {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    "transformers": {"safetensors": "model", "bin": "pytorch_model"},
    "icexport": {"safetensors": "probe", "bin": "probe"},
}
_LIBRARIES = {"text_encoder": "transformers", "probe": "icexport"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\b")


@dataclass(frozen=True)
class Weights:
    """The files that hold the weights of one component.

    Attributes:
        files: names or paths of what is read; of several shards, their index comes first.
        format: ``safetensors`` or ``bin``, a pickle.
        variant: as in ``<name>.<variant>.safetensors``; None: the files without one.
        named: whether they have the names by which diffusers and transformers find them.
    """

    files: tuple[str, ...]
    format: str
    variant: str | None = None
    named: bool = True

    @property
    def index(self) -> str | None:
        """Name of the index of several shards."""
        return self.files[0] if self.files[0].endswith(".json") else None


def library_of(part: str) -> str:
    """Return the library that saves a component: it decides how the files are called."""
    return _LIBRARIES.get(part, "diffusers")


def choose_weights(names: Collection[str], library: str, variant: str | None = None) -> Weights | None:
    """Return the weights that a library would read from a folder; None: there are none that it finds.

    Args:
        names: names of the files in the folder.
        library: ``diffusers``, ``transformers`` or ``icexport``.
        variant: variant to read. None, or one that is not there: the files without one, or the only variant.

    Returns:
        Of several shards, the index alone.

    Raises:
        UsageError: there are several variants and nothing else.
    """
    found = _candidates(names, library)
    variants = sorted({v for v, _ in found if v is not None})
    if variant not in variants:
        plain = any(v is None for v, _ in found)
        if len(variants) > 1 and not plain:
            raise UsageError(f"only the variants {', '.join(variants)}: choose one with --variant")
        variant = None if plain or not variants else variants[0]
    for kind in ("safetensors", "bin"):
        if (variant, kind) in found:
            return Weights((found[variant, kind],), kind, variant)
    return None


def _candidates(names: Collection[str], library: str) -> dict[tuple[str | None, str], str]:
    """Return the file or index for each variant and format."""
    found: dict[tuple[str | None, str], str] = {}
    # Where both are there, diffusers reads the index and transformers the single file.
    order = (_index_name, _file_name) if library == "transformers" else (_file_name, _index_name)
    for pattern in order:
        for kind, stem in _STEMS[library].items():
            for name in sorted(names):
                if (match := re.fullmatch(pattern(stem, kind), name)) and not _SHARD.search(name):
                    found[match["variant"], kind] = name
    return found


def _file_name(stem: str, kind: str) -> str:
    return rf"{stem}(?:\.(?P<variant>[^.]+))?\.{kind}"


def _index_name(stem: str, kind: str) -> str:
    return rf"{stem}\.{kind}\.index(?:\.(?P<variant>[^.]+))?\.json"


def find_weights(folder: Path, library: str, variant: str | None = None) -> Weights:
    """Return the weights of a component's folder, with the paths of all of their files.

    Files of other names count where there is only one: trainers leave them, and so do people.

    Args:
        folder: folder of the component.
        library: ``diffusers``, ``transformers`` or ``icexport``.
        variant: variant to read; None: see ``choose_weights``.

    Raises:
        CheckpointError: there are no weights, or parts of them are missing.
        UsageError: it is not clear which are meant.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    try:
        found = choose_weights(names, library, variant)
    except UsageError as error:
        raise UsageError(f"{folder} has {error}.") from error
    if found is None:
        found = _only_one(folder, names)
    elif found.index:
        found = replace(found, files=(found.index, *_shards(folder / found.index)))
    if found.variant not in (None, variant):
        logger.info("%s has weights of variant %r only: these are read.", folder, found.variant)
    return replace(found, files=tuple(str(folder / name) for name in found.files))


def _only_one(folder: Path, names: Iterable[str]) -> Weights:
    others = sorted(name for name in names if name.endswith(SUFFIXES))
    if not others:
        raise CheckpointError(f"{folder} has no weights: no .safetensors file, no .bin, .ckpt, .pt or .pth.")
    if len(others) > 1:
        raise UsageError(
            f"{folder} has several files that could be its weights: {', '.join(others)}. Name the one that you mean, "
            "or leave only that one in the folder."
        )
    kind = "safetensors" if others[0].endswith(".safetensors") else "bin"
    return Weights((others[0],), kind, named=False)


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists.

    Raises:
        CheckpointError: the index is damaged, or files are missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: it lists no shards. Copy or download it again.") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside of its folder: {', '.join(outside)}. Do not use it.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index} lists {len(names)} shards, and these are missing: {', '.join(missing)}. Copy or download them."
        )
    return names


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a file of weights, without reading the tensors.

    Of a pickle, what lies under ``state_dict`` counts, as in checkpoints of PyTorch Lightning.

    Raises:
        CheckpointError: the file is missing, damaged, or a pickle that holds more than tensors and plain containers.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "numpy") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged or cut short: {error}. Copy or download it again.") from error
    from icexport.models.checkpoint import read_pickle  # with torch

    state = read_pickle(path, mapped=True)
    while isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]
    return dict(_shapes(state)) if isinstance(state, Mapping) else {}


def _shapes(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of tensors, also of those in mappings of one level below: they tell kinds apart."""
    for name, value in state.items():
        if hasattr(value, "shape"):
            yield f"{prefix}{name}", tuple(value.shape)
        elif isinstance(value, Mapping) and not prefix:
            yield from _shapes(value, f"{name}.")
