"""Faults as exporters, rewrites and engines make them, put into an ONNX graph by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from icexport.parity.bisect import scopes


@dataclass(frozen=True)
class Fault:
    """One fault: where it is, and what the gate has to name."""

    graph: str
    make: Callable[[onnx.ModelProto], None]
    named: str


def node(model: onnx.ModelProto, operator: str, module: str) -> onnx.NodeProto:
    """The first node of an operator whose innermost module is ``module``."""
    return next(n for n in model.graph.node if n.op_type == operator and scopes(n)[-1:] == (module,))


def attribute(found: onnx.NodeProto, name: str, value: float) -> None:
    """Set an attribute of a node."""
    others = [a for a in found.attribute if a.name != name]
    del found.attribute[:]
    found.attribute.extend([*others, helper.make_attribute(name, value)])


def insert(model: onnx.ModelProto, found: onnx.NodeProto, index: int, *nodes: onnx.NodeProto) -> None:
    """Put nodes before a node and let its input ``index`` read the last one's output."""
    place = list(model.graph.node).index(found)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(place + offset, new)
    model.graph.node[place + len(nodes)].input[index] = nodes[-1].output[0]


def constant(model: onnx.ModelProto, name: str, value: float | list[int]) -> str:
    """Add a constant, float32 or int64, and return its name."""
    array = np.array(value, np.int64 if isinstance(value, list) else np.float32)
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def wrong_epsilon(module: str) -> Callable[[onnx.ModelProto], None]:
    def make(model: onnx.ModelProto) -> None:
        variance = node(model, "Sqrt", module).input[0]
        added = next(n for n in model.graph.node if variance in n.output)
        added.input[1] = constant(model, "fault.epsilon", 0.1)

    return make


def wrong_groups(module: str) -> Callable[[onnx.ModelProto], None]:
    """Mean and deviation are those of halves of the channels."""

    def make(model: onnx.ModelProto) -> None:
        values = {i.name: numpy_helper.to_array(i).tolist() for i in model.graph.initializer if i.dims == [3]}
        for found in [n for n in model.graph.node if len(n.input) > 1 and scopes(n)[-1:] == (module,)]:
            match values.get(found.input[1]):
                case [0, int(), -1]:
                    found.input[1] = constant(model, f"fault.{found.name}", [0, 2, -1])
                case [1, int(groups), int(channels)]:
                    found.input[1] = constant(model, f"fault.{found.name}", [1, 2, groups * channels // 2])

    return make


def transposed_weight(module: str) -> Callable[[onnx.ModelProto], None]:
    def make(model: onnx.ModelProto) -> None:
        found = node(model, "MatMul", module)
        turn = helper.make_node("Transpose", [found.input[1]], ["fault.turned"], perm=[1, 0])
        insert(model, found, 1, turn)

    return make


def no_bias(module: str) -> Callable[[onnx.ModelProto], None]:
    def make(model: onnx.ModelProto) -> None:
        del node(model, "Conv", module).input[2]

    return make


def overflow(module: str) -> Callable[[onnx.ModelProto], None]:
    """As float16 does with a layer's input that is too large for it."""

    def make(model: onnx.ModelProto) -> None:
        found = node(model, "Conv", module)
        large = constant(model, "fault.large", 1e6)
        insert(
            model,
            found,
            0,
            helper.make_node("Mul", [found.input[0], large], ["fault.grown"]),
            helper.make_node("Cast", ["fault.grown"], ["fault.half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["fault.half"], ["fault.wide"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["fault.wide", large], ["fault.back"]),
        )

    return make


def left_out(name: str) -> Callable[[onnx.ModelProto], None]:
    """An input that is added to nothing."""

    def make(model: onnx.ModelProto) -> None:
        found = next(n for n in model.graph.node if n.op_type == "Add" and name in n.input)
        (other,) = (value for value in found.input if value != name)
        for reader in model.graph.node:
            reader.input[:] = [other if value == found.output[0] else value for value in reader.input]

    return make


def swapped_outputs(first: str, second: str) -> Callable[[onnx.ModelProto], None]:
    def make(model: onnx.ModelProto) -> None:
        other = {first: second, second: first}
        for found in model.graph.node:
            for side in (found.input, found.output):
                side[:] = [other.get(value, value) for value in side]

    return make


def swapped_inputs(first: str, second: str) -> Callable[[onnx.ModelProto], None]:
    def make(model: onnx.ModelProto) -> None:
        other = {first: second, second: first}
        for found in model.graph.node:
            found.input[:] = [other.get(value, value) for value in found.input]

    return make


def timestep_off_by_one(model: onnx.ModelProto) -> None:
    one = constant(model, "fault.one", 1.0)
    for found in [n for n in model.graph.node if "timestep" in n.input]:
        found.input[list(found.input).index("timestep")] = "fault.late"
    model.graph.node.insert(0, helper.make_node("Add", ["timestep", one], ["fault.late"]))


def wrong_scale(module: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: attribute(node(model, "MultiHeadAttention", module), "scale", 1.0)


def wrong_heads(module: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: attribute(node(model, "MultiHeadAttention", module), "num_heads", 4)


def one_for_all(name: str) -> Callable[[onnx.ModelProto], None]:
    """Every row of a batch gets the first row's value of an input."""

    def make(model: onnx.ModelProto) -> None:
        ends = [constant(model, f"fault.{n}", [v]) for n, v in (("zero", 0), ("one", 1))]
        for found in [n for n in model.graph.node if name in n.input]:
            found.input[list(found.input).index(name)] = "fault.same"
        model.graph.node.insert(0, helper.make_node("Slice", [name, *ends, ends[0]], ["fault.first"]))
        model.graph.node.insert(1, helper.make_node("Shape", [name], ["fault.shape"]))
        model.graph.node.insert(2, helper.make_node("Expand", ["fault.first", "fault.shape"], ["fault.same"]))

    return make


def smooth_upsampling(module: str) -> Callable[[onnx.ModelProto], None]:
    def make(model: onnx.ModelProto) -> None:
        found = node(model, "Resize", module)
        del found.attribute[:]
        found.attribute.extend([helper.make_attribute("mode", "linear")])

    return make


BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
UPSAMPLER = "vae.decoder.up_blocks.0.upsamplers.0"
FAULTS = {
    "wrong epsilon": Fault("unet", wrong_epsilon("unet.mid_block.resnets.0.norm1"), "unet.mid_block.resnets.0.norm1"),
    "wrong groups": Fault("unet", wrong_groups("unet.mid_block.resnets.1.norm2"), "unet.mid_block.resnets.1.norm2"),
    "transposed weight": Fault("unet", transposed_weight(f"{BLOCK}.attn1.to_q"), f"{BLOCK}.attn1.to_q"),
    "wrong scale": Fault("unet", wrong_scale(f"{BLOCK}.attn1"), f"{BLOCK}.attn1"),
    "wrong heads": Fault("unet", wrong_heads(f"{BLOCK}.attn2"), f"{BLOCK}.attn2"),
    "overflow": Fault("unet", overflow("unet.mid_block.resnets.1.conv1"), "unet.mid_block.resnets.1.conv1"),
    "residual left out": Fault("unet", left_out("down_residual_2"), "unet.up_blocks.0.resnets.1.norm1"),
    "middle residual left out": Fault("unet", left_out("mid_residual"), "unet.up_blocks.0.resnets.0.norm1"),
    "swapped taps": Fault("unet", swapped_outputs("tap_0", "tap_1"), "unet.tap_0"),
    "timestep off by one": Fault("unet", timestep_off_by_one, "unet.time_proj"),
    "one prompt for all rows": Fault("unet", one_for_all("prompt_embeds"), "attn2.to_k"),
    "one timestep for all rows": Fault("unet", one_for_all("timestep"), "unet.time_proj"),
    "no bias": Fault("controlnet", no_bias("controlnet.conv_in"), "controlnet.conv_in"),
    "ControlNet's timestep off by one": Fault("controlnet", timestep_off_by_one, "controlnet.time_proj"),
    "smooth upsampling": Fault("vae_decoder", smooth_upsampling(UPSAMPLER), UPSAMPLER),
    "swapped features": Fault("probe", swapped_inputs("tap_0", "tap_1"), "probe."),
}
REAL_NAMES = {"residual left out": "unet.up_blocks.3.resnets.0.norm1"}
"""What is named in Stable Diffusion 1.5's architecture, where it differs: it has more residuals."""
