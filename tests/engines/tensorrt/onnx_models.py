"""Small ONNX files for the tests of TensorRT builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from engines.base import TensorSpec
from icexport.export.onnx import export_graph
from icexport.graphs.graph import Graph
from icexport.graphs.profile import SizeRange

SCOPES = "pkg.torch.onnx.name_scopes"
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
NUMPY = {FLOAT: np.float32, HALF: np.float16}


class MidBlock(nn.Module):
    """The middle of a Stable Diffusion UNet, 16 channels: convolutions, group norm, self and cross attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = UNetMidBlock2DCrossAttn(
            in_channels=16, temb_channels=16, cross_attention_dim=16, num_attention_heads=1, resnet_groups=4
        )

    def forward(self, sample: Tensor, time_embedding: Tensor, prompt_embeds: Tensor) -> tuple[Tensor]:
        return (self.mid_block(sample, time_embedding, encoder_hidden_states=prompt_embeds),)


def export_mid_blocks(folder: Path) -> None:
    """Write ``fp16.onnx`` with a free batch and ``fp32.onnx`` for two pictures; weights lie in ``….onnx.data``."""
    folder.mkdir()
    for name, dtype, batch in (
        ("fp16", torch.float16, SizeRange(1, 2, 8)),
        ("fp32", torch.float32, SizeRange(2, 2, 2)),
    ):
        sample = TensorSpec("sample", dtype, ("batch", 16, 8, 8))
        inputs = (
            sample,
            TensorSpec("time_embedding", dtype, (1, 16)),
            TensorSpec("prompt_embeds", dtype, ("batch", 6, 16)),
        )
        graph = Graph("mid", MidBlock().to(dtype).eval(), inputs, (TensorSpec("out", dtype, sample.shape),))
        export_graph(graph, folder / f"{name}.onnx", {"batch": batch})


def profile(smallest: int, usual: int, largest: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """An optimisation profile of the mid blocks, by batch sizes."""
    batches = (smallest, usual, largest)
    return {
        "sample": tuple((batch, 16, 8, 8) for batch in batches),
        "prompt_embeds": tuple((batch, 6, 16) for batch in batches),
    }


def conv(name: str, source: str, result: str, element: int) -> tuple[onnx.NodeProto, onnx.TensorProto]:
    """A 1x1 convolution of 4 channels and its weight; from module ``net.<name>``."""
    node = helper.make_node("Conv", [source, f"{name}.weight"], [result], name=f"node_{name}")
    node.metadata_props.add(key=SCOPES, value=f"['', 'net', 'net.{name}', 'convolution']")
    return node, numpy_helper.from_array(np.ones((4, 4, 1, 1), NUMPY[element]), f"{name}.weight")


def cast(source: str, result: str, element: int) -> onnx.NodeProto:
    """A Cast."""
    return helper.make_node("Cast", [source], [result], name=f"node_{result}", to=element)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    values: dict[str, int],
    weights: Sequence[onnx.TensorProto] = (),
    shape: Sequence[int | str] = (1, 4, 8, 8),
    opset: int = 21,
) -> Path:
    """Write a graph whose inputs are the values that no node makes, and whose outputs those that no node takes.

    Args:
        path: To write.
        nodes: In order.
        values: Element type of every value.
        weights: Initialisers.
        shape: Of every value.
        opset: Of the default domain; other domains have version 1.
    """
    infos = {name: helper.make_tensor_value_info(name, element, shape) for name, element in values.items()}
    made = {name for node in nodes for name in node.output}
    taken = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "graph",
        [info for name, info in infos.items() if name not in made],
        [info for name, info in infos.items() if name not in taken],
        weights,
        value_info=[info for name, info in infos.items() if name in made & taken],
    )
    domains = {node.domain for node in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path
