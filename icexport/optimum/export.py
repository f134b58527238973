"""icexport's graphs as parts of an export by optimum. Needs the extra ``icexport[optimum]``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import optimum.exporters.utils as optimum_parts
from optimum.exporters.onnx import OnnxConfig
from optimum.utils import NormalizedConfig
from safetensors import safe_open
from torch import Tensor, nn

from engines.base import TensorSpec
from icexport import conditions
from icexport.errors import CheckpointError, ExportError
from icexport.graphs.graph import Graph, example_inputs
from icexport.graphs.stable_diffusion import controlnet_graph, probe_graph, unet_graph
from icexport.models.fit import check_source
from icexport.models.precision import precision
from icexport.models.probe import CONFIG_NAME, InnerControlProbe
from icexport.models.sizes import latent_multiple, vae_factor
from icexport.models.source import ModelSource
from icexport.optimum.pipeline import name_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def controlled(condition: str, model: str, controlnet: str | None = None, probe: str | None = None) -> Iterator[None]:
    """Let a diffusers export by optimum inside the ``with`` block include the ControlNet, its UNet and the probe.

    Args:
        condition: name of the condition, as ``icexport build --cond`` takes it.
        model: base model that optimum is going to export: a folder or a Hub id.
        controlnet: folder or Hub id; None: ``controlnet-<condition>`` in the base model's folder.
        probe: folder or Hub id, likewise; ``none``: no probe, and a UNet without taps.

    Raises:
        UsageError: a ControlNet or probe must be named, or the condition is unknown.
        CheckpointError: a folder is not what it should be, the models do not work together, or were saved by
            transformers 5.
        ExportError: optimum exported without asking for the parts.
    """
    source = ModelSource.find(condition, model, controlnet, probe)
    conditions.get(condition)
    check_source(source)
    _check_readable(source.base.path)
    plain = optimum_parts.get_diffusion_models_for_export
    asked = False

    def with_control(pipeline: DiffusionPipeline, *args: Any, float_dtype: str = "fp32", **kwargs: Any) -> Any:
        nonlocal asked
        asked = True
        save_config = pipeline.save_config

        def save(folder: Path, **options: Any) -> None:
            save_config(folder, **options)
            name_pipeline(folder)

        pipeline.save_config = save
        return plain(pipeline, *args, float_dtype=float_dtype, **kwargs) | _parts(pipeline, source, float_dtype)

    optimum_parts.get_diffusion_models_for_export = with_control
    try:
        yield
    finally:
        optimum_parts.get_diffusion_models_for_export = plain
    if not asked:
        raise ExportError(
            f"optimum exported {model} without the ControlNet: it did not take it for a diffusers pipeline, or its "
            "version is not the one that icexport[optimum] pins. Try --library-name diffusers."
        )


class Part(nn.Module):
    """A graph as optimum calls it: named tensors in, named tensors out, with a ``config`` that it may write to.

    Args:
        graph: graph to run.
        save_config: writes the wrapped model's ``config.json`` into a folder, which need not exist.
    """

    def __init__(self, graph: Graph, save_config: Callable[[Path], object]) -> None:
        super().__init__()
        self.module = graph.module
        self.config = SimpleNamespace()
        self.save_config = save_config
        # optimum and torch.onnx take the order of the inputs from the signature, and residuals and taps come as *args.
        signature = Signature([Parameter(spec.name, Parameter.POSITIONAL_OR_KEYWORD) for spec in graph.inputs])

        def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
            outputs = graph.module(*signature.bind(*args, **kwargs).args)
            return {spec.name: tensor for spec, tensor in zip(graph.outputs, outputs, strict=True)}

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


class GraphConfig(OnnxConfig):  # type: ignore[misc]
    """What optimum has to know of a graph: names, free axes and example inputs.

    Args:
        graph: the described graph.
        unet_config: config of the UNet, which knows the model's native size.
        float_dtype: dtype of the floats, ``fp32`` or ``fp16``, as the graph's module is.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    ATOL_FOR_VALIDATION = 1e-4

    def __init__(self, graph: Graph, unet_config: Mapping[str, Any], float_dtype: str) -> None:
        super().__init__(SimpleNamespace(), task="semantic-segmentation", float_dtype=float_dtype)
        self._graph = graph
        self._multiple = latent_multiple(unet_config)
        self._native = unet_config["sample_size"]

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Free axes of every input."""
        return _free_axes(self._graph.inputs)

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Free axes of every output."""
        return _free_axes(self._graph.outputs)

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: int) -> dict[str, Any]:
        """Return seeded inputs as torch tensors or, for framework ``np``, arrays.

        Args:
            framework: ``pt`` or ``np``.
            shapes: optimum's ``batch_size``, and ``height`` and ``width`` in latent cells for a model that does not
                say its native size.
        """
        native = isinstance(self._native, int)
        height, width = (self._native if native else shapes[side] for side in ("height", "width"))
        count = shapes["batch_size"]
        symbols = {
            "samples": count,
            "pictures": count,
            "rows": height // self._multiple,
            "columns": width // self._multiple,
        }
        inputs = example_inputs(self._graph.inputs, symbols)
        return {name: tensor.numpy() for name, tensor in inputs.items()} if framework == "np" else inputs

    def fix_dynamic_axes(
        self,
        model_path: Path,
        device: str = "cpu",
        dtype: str | None = None,
        input_shapes: dict[str, int] | None = None,
    ) -> None:
        """Mark the axes that the trace left open but that are fixed."""
        # Without dtype: optimum would cast the timestep, too, which is float32 in every precision.
        super().fix_dynamic_axes(model_path, device=device, input_shapes=input_shapes)


def _parts(pipeline: Any, source: ModelSource, float_dtype: str) -> dict[str, tuple[Part, GraphConfig]]:
    """Return the part and config of each graph by name."""
    dtype = precision(float_dtype).torch
    unet = pipeline.unet
    length = pipeline.text_encoder.config.max_position_embeddings
    controlnet, probe = source.controlnet_model(dtype), source.probe_model(dtype)
    graphs: list[tuple[Graph, Callable[[Path], object]]] = [
        (unet_graph(unet, length, probe.config if probe else None, dtype), unet.save_config),
        (controlnet_graph(controlnet, length, vae_factor(pipeline.vae.config), dtype), controlnet.save_config),
    ]
    if probe:
        graphs.append((probe_graph(probe, unet, dtype), lambda folder: _save_probe_config(probe, folder)))
    return {graph.name: (Part(graph, save), GraphConfig(graph, unet.config, float_dtype)) for graph, save in graphs}


def _check_readable(base: Path) -> None:
    """Refuse what transformers 4 reads wrongly: it would only warn, and optimum export random weights.

    Raises:
        CheckpointError: text encoder or tokenizer were saved by transformers 5.
    """
    keys: set[str] = set()
    for path in (base / "text_encoder").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= set(file.keys())
    prefixed = all(key.startswith("text_model.") for key in keys)
    if not prefixed or not (base / "tokenizer" / "vocab.json").is_file():
        raise CheckpointError(
            f"{base} was saved by transformers 5, which the transformers 4 that optimum-onnx needs cannot read: the "
            "weights in text_encoder lack the prefix text_model, or tokenizer has no vocab.json. Use text_encoder and "
            "tokenizer of the model that it was made from, or icexport build with transformers 5."
        )


def _save_probe_config(probe: InnerControlProbe, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(probe.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _free_axes(specs: tuple[TensorSpec, ...]) -> dict[str, dict[int, str]]:
    return {spec.name: {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in specs}
