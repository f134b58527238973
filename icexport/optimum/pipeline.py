"""Draws with what ``optimum-cli export onnx`` wrote: optimum's own pipelines have no ControlNet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from engines.onnxruntime import OnnxRuntimeEngine
from icexport.errors import CheckpointError, UnsupportedOptionError
from icexport.models.base_model import INDEX_NAME
from icexport.models.part import CONFIG_NAME, read_config
from icexport.runtime.components import EngineControlNet, EngineTextEncoder, EngineUNet, EngineVae
from icexport.runtime.eager import eager_pipeline
from icexport.runtime.schedulers import load_scheduler


class ORTStableDiffusionControlNetPipeline(StableDiffusionControlNetPipeline):  # type: ignore[misc]
    """Diffusers' pipeline of Stable Diffusion with a ControlNet, on ONNX files in ONNX Runtime.

    It draws what diffusers draws, and reads no probe: for that, and for everything else that a bundle has, see
    ``icexport.InnerControlPipeline``.
    """

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Any:
        """Load the pipeline.

        Args:
            folder: what the export wrote.
            device: ``cpu``, ``cuda`` or ``cuda:<i>``.

        Raises:
            CheckpointError: the folder holds no such export.
            BackendUnavailableError: the device cannot be used.
            EngineError: a graph is damaged.
        """
        folder = Path(folder)
        if read_config(folder / INDEX_NAME).get("_class_name") != cls.__name__:
            raise CheckpointError(
                f"{folder} was not exported with a ControlNet: --model-kwargs '{{\"condition\": ...}}'."
            )

        def load(name: str) -> OnnxRuntimeEngine:
            return OnnxRuntimeEngine(name, folder / name / "model.onnx", device)

        def config(name: str) -> dict[str, Any]:
            return read_config(folder / name / CONFIG_NAME)

        return eager_pipeline(
            unet=EngineUNet(load("unet"), config("unet")),
            controlnet=EngineControlNet(load("controlnet"), config("controlnet")),
            text_encoder=EngineTextEncoder(_TextEncoder(load("text_encoder")), config("text_encoder")),
            vae=EngineVae(_Decoder(load("vae_decoder")), config("vae_decoder")),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            scheduler=load_scheduler(folder / "scheduler"),
            kind=cls,
        )


def name_pipeline(folder: Path) -> None:
    """Let an export's ``model_index.json`` name the pipeline that can run it, and its ControlNet."""
    index = read_config(folder / INDEX_NAME) | {
        "_class_name": ORTStableDiffusionControlNetPipeline.__name__,
        "controlnet": ["diffusers", "ControlNetModel"],
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Renamed:
    """An engine whose inputs and outputs have optimum's names; see ``engines.Engine``."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.engine = engine
        self.name, self.backend, self.device = engine.name, engine.backend, engine.device
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def close(self) -> None:
        self.engine.close()


class _TextEncoder(_Renamed):
    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        if inputs["clip_skip"]:
            raise UnsupportedOptionError("clip_skip: optimum's text encoder gives its last layer only.")
        ids = inputs["input_ids"].to(self.inputs[0].dtype)
        return {"prompt_embeds": self.engine({"input_ids": ids}, ["last_hidden_state"])["last_hidden_state"]}


class _Decoder(_Renamed):
    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {"pixels": self.engine({"latent_sample": inputs["latents"]})["sample"]}
