"""One component of a model before it is loaded: its config, and the files of its weights. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icexport.errors import CheckpointError, UsageError
from icexport.models import kinds
from icexport.models.weights import PICKLES, Weights, find_weights, library_of, tensor_shapes

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Part:
    """A component that has weights.

    Attributes:
        name: ``unet``, ``vae``, ``text_encoder``, ``controlnet`` or ``probe``.
        config: its config, as its file has it.
        weights: paths of its weights.
        folder: folder that diffusers or transformers load it from; None: a file of weights in a layout of its own.
        config_path: file of the config; None: it was derived.
        prefix: what the names of its tensors begin with, in a file that holds other components, too.
    """

    name: str
    config: Mapping[str, Any]
    weights: Weights
    folder: Path | None = None
    config_path: Path | None = None
    prefix: str = ""

    @classmethod
    def of_folder(cls, name: str, folder: Path, variant: str | None = None) -> Part:
        """Return the component in a folder.

        Raises:
            CheckpointError: config or weights are missing or damaged.
            UsageError: it is a component of another kind, or it is not clear which weights are meant.
        """
        path = folder / CONFIG_NAME
        config = read_config(path)
        if config.get("model_type") == "clip" and isinstance(config.get("text_config"), dict):
            # CLIP's config, of which transformers takes the text encoder's.
            config = config["text_config"] | {"architectures": config.get("architectures")}
        if not kinds.fits(name, config):
            kind = kinds.kind_of_config(config)
            what = kinds.explain(kind) if kind and kind.part != name else f"a {kinds.class_of(config)}"
            raise UsageError(f"{folder} is no {name}: it is {what.removesuffix('.')}.")
        weights = find_weights(folder, library_of(name), variant)
        if name == "probe" and (weights.format == "bin" or not weights.named):
            raise UsageError(
                f"{folder} has no probe.safetensors, but {Path(weights.files[0]).name}. If that is an align model, "
                f"convert it: icexport convert {weights.files[0]} --cond NAME --output NEW."
            )
        return cls(name, config, weights, folder if weights.named else None, path)

    @classmethod
    def of_file(
        cls, name: str, file: Path, config: Mapping[str, Any], config_path: Path | None, prefix: str = ""
    ) -> Part:
        """Return the component whose weights are in a file of a layout of their own, given its config."""
        kind = "bin" if file.suffix in PICKLES else "safetensors"
        return cls(name, config, Weights((str(file),), kind, named=False), None, config_path, prefix)

    @property
    def paths(self) -> dict[str, Path]:
        """Every file that it depends on, by ``part/file``."""
        paths = [Path(file) for file in self.weights.files]
        if self.config_path is not None:
            paths.append(self.config_path)
        return {f"{self.name}/{path.name}": path for path in paths}

    def elements(self) -> int:
        """Return the number of weights, from the headers of the files.

        Raises:
            CheckpointError: a file is damaged, cut short, or a pickle that holds more than tensors.
        """
        files = [Path(file) for file in self.weights.files if file != self.weights.index]
        return sum(
            math.prod(shape)
            for file in files
            for name, shape in tensor_shapes(file).items()
            if name.startswith(self.prefix)
        )


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the file is missing or holds none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return config
