"""What the probe head should take on an H200, counted and not measured.

Every operator of the real modules is run on tensors without memory, and its traffic and arithmetic are added up. The
time of an operator is at least its traffic at the memory's bandwidth, and at least its arithmetic at the rate of the
unit that does it; a launch comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import head
from benchmarks.gpu.official import OfficialHead
from engines.kernels import SPECS
from engines.kernels.spec import Case, Size
from icexport.models.fused_probe import FusedProbe

TITLE = "Prediction for an H200: nothing here was measured"
_MATRIX = ("aten::convolution", "aten::addmm", "aten::mm")


@dataclass(frozen=True)
class Device:
    """Figures that a prediction rests on.

    Attributes:
        name: name of the GPU.
        bandwidth: bandwidth of the memory, bytes a second.
        matrix_rate: rate of dense float16 on tensor cores, FLOP a second.
        vector_rate: rate of float32 outside of them, FLOP a second.
        graph_launch: time that each kernel of a CUDA graph costs beside its work, in seconds.
        eager_launch: time that each operator costs when Python launches it, in seconds.
        source: where the figures come from.
    """

    name: str
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    graph_launch: float
    eager_launch: float
    source: str


DEVICES = {
    "h200": Device(
        "H200 SXM",
        4.8e12,
        989e12,
        67e12,
        1.5e-6,
        6e-6,
        "bandwidth and rates: the vendor's data sheet; launch costs: assumptions, to be replaced by measurements",
    )
}
STEPS_MS = {"goal": 8.5, "stretch goal": 7.3, "published for an H100 (stable-fast)": 13.8}
"""Milliseconds of a UNet + ControlNet step: 512 x 512 px, float16, guidance."""
SHARE_GOAL = 0.03


@dataclass(frozen=True)
class Operation:
    """One operator as it was called.

    Attributes:
        name: name of the operator.
        case: shapes of the operands.
        bytes: least traffic: every input read once, every output written once.
        matrix_flops: number of operations of convolutions and linear layers.
        vector_flops: number of operations of everything else; counted for the own kernels only, whose specs know them.
    """

    name: str
    case: str
    bytes: int
    matrix_flops: int
    vector_flops: int

    def floor(self, device: Device) -> float:
        """Return the least seconds."""
        return max(
            self.bytes / device.bandwidth,
            self.matrix_flops / device.matrix_rate,
            self.vector_flops / device.vector_rate,
        )


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that computes something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view:
            self.operations.append(_operation(func._schema.name, args, out))
        return out


def _operation(name: str, args: tuple[Any, ...], out: Any) -> Operation:
    kind, _, op = name.partition("::")
    tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
    if kind == "icexport":
        spec, case = SPECS[op], _CASES[op](args, out)
        flops = spec.flops(case)
        matrix, vector = (flops, 0) if op == "dual_projection" else (0, flops)
        shapes = f"B{case.batch} " + " ".join("x".join(map(str, size)) for size in (case.source, case.target))
        return Operation(op, shapes, spec.traffic_bytes(case, args[0].element_size()), matrix, vector)
    if op == "new_zeros":
        tensors = [out]  # its other tensor only lends its type
    shapes = " ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
    return Operation(op, shapes, sum(map(_bytes, tensors)), _matrix_flops(name, args, out), 0)


def _bytes(tensor: Tensor) -> int:
    """Return memory behind a tensor: what was expanded is there only once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * math.prod(sizes)


def _matrix_flops(name: str, args: tuple[Any, ...], out: Any) -> int:
    if name not in _MATRIX:
        return 0
    if name == "aten::convolution":
        return int(2 * out.numel() * math.prod(args[1].shape[1:]))
    return int(2 * out.numel() * args[-2].shape[1])


def _size(tensor: Tensor) -> Size:
    _, channels, height, width = tensor.shape
    return channels, height, width


def _resize_case(args: tuple[Any, ...], out: Tensor) -> Case:
    x, _, _, shift, first, _, _, groups = args[:8]
    return Case(len(x), _size(x), _size(out), groups, first, shift_per_sample=len(shift) == len(x))


def _residual_case(args: tuple[Any, ...], out: Tensor) -> Case:
    skip, first, groups, normalise = args[2], args[9], args[10], args[12]
    return Case(len(skip), _size(skip), _size(out), groups, first, normalise_skip=normalise)


_CASES: dict[str, Callable[[tuple[Any, ...], Tensor], Case]] = {
    "dual_projection": lambda args, out: Case(len(out), _size(args[0]), _size(out)),
    "resize_group_norm_relu": _resize_case,
    "residual_mix": _residual_case,
}


@contextmanager
def _counted(found: list[Operation]) -> Iterator[None]:
    with torch.no_grad(), _Tally() as tally:
        yield
    found += tally.operations


def operations(latent: int = 64, batch: int = 1) -> dict[str, list[Operation]]:
    """Return the operators of the head in float16, by formulation: ``official``, ``reordered`` and ``fused``."""
    probe = head.probe("meta", torch.float16)
    taps, embedding = head.inputs("meta", torch.float16, latent, batch)
    found: dict[str, list[Operation]] = {}
    for name, module in (("official", OfficialHead.of(probe)), ("reordered", probe), ("fused", FusedProbe(probe))):
        found[name] = []
        with _counted(found[name]):
            module(taps, embedding)
    return found


def predict(device: Device) -> dict[str, Any]:
    """Return all numbers, in SI units but for names that say otherwise."""
    found = operations()
    fidelity, case = SPECS["fidelity_reduce"], Case(1, (3, 64, 64), (3, 512, 512))
    check = Operation(fidelity.name, "B1 3x64x64 3x512x512", fidelity.traffic_bytes(case, 4), 0, fidelity.flops(case))
    heads = {name: _total(ops, device) for name, ops in found.items()}
    official, fused = heads["official"], heads["fused"]
    return {
        "title": TITLE,
        "device": asdict(device),
        "size": "Stable Diffusion 1.5, 9 attention taps, latent 64 x 64, batch 1 (the conditional half), float16",
        "kernels": [_row(operation, count, device) for operation, count in _distinct([*found["fused"], check])],
        "heads": heads,
        "official_over_fused": {name: official[name] / fused[name] for name in ("bytes", "matrix_flops", "launches")},
        "goals": [
            {
                "step": name,
                "step_ms": step,
                "allowed_us": 1e3 * step * SHARE_GOAL,
                **{f"{head}_share": heads[head]["graph_us"] / (1e3 * step) for head in heads},
            }
            for name, step in STEPS_MS.items()
        ],
    }


def _distinct(ops: Sequence[Operation]) -> Iterator[tuple[Operation, int]]:
    """List equal operations only once, with their number."""
    for operation in dict.fromkeys(ops):
        yield operation, ops.count(operation)


def _row(operation: Operation, count: int, device: Device) -> dict[str, Any]:
    return {**asdict(operation), "launches": count, "floor_us": 1e6 * operation.floor(device)}


def _total(ops: Sequence[Operation], device: Device) -> dict[str, Any]:
    floor = sum(operation.floor(device) for operation in ops)
    sums = {name: sum(getattr(op, name) for op in ops) for name in ("bytes", "matrix_flops", "vector_flops")}
    return {
        **sums,
        "launches": len(ops),
        "floor_us": 1e6 * floor,
        "graph_us": 1e6 * (floor + len(ops) * device.graph_launch),
        "eager_us": 1e6 * max(floor, len(ops) * device.eager_launch),
    }


def markdown(prediction: dict[str, Any]) -> str:
    """Return the tables for people."""
    device = prediction["device"]
    lines = [
        f"# {prediction['title']}",
        "",
        f"{prediction['size']}.",
        "Made by `python -m benchmarks.kernels --predict h200`; to be checked by the same command on that GPU.",
        "",
        f"* {device['name']}: {device['bandwidth'] / 1e12:g} TB/s, {device['matrix_rate'] / 1e12:g} TFLOP/s dense "
        f"float16, {device['vector_rate'] / 1e12:g} TFLOP/s float32; a launch costs "
        f"{1e6 * device['graph_launch']:g} us in a CUDA graph, {1e6 * device['eager_launch']:g} us from Python. "
        f"{device['source'].capitalize()}.",
        "* Floor: the sum over operators of the slowest of traffic, matrix and vector work, each at the full rate. "
        "Real kernels of this size fill only part of the GPU and will be slower; what stays in the L2 cache can be "
        "faster.",
        "* In a graph: the floor and the launches, one after the other. From Python: whichever of the two is longer.",
        "* Eager torch needs one launch or more for each of its operators (a GroupNorm three); cuDNN may add changes "
        "of layout around a convolution. Neither is counted.",
        "",
        "## Head",
        "",
        "| formulation | operators | traffic MB | matrix GFLOP | floor us | in a graph us | from Python us |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {t['launches']} | {t['bytes'] / 1e6:.1f} | {t['matrix_flops'] / 1e9:.2f} | {t['floor_us']:.1f} | "
        f"{t['graph_us']:.0f} | {t['eager_us']:.0f} |"
        for name, t in prediction["heads"].items()
    ]
    lines += [
        "",
        f"## Against {100 * SHARE_GOAL:g} % of a UNet + ControlNet step",
        "",
        "| step | ms | allowed us | fused | reordered | official |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {goal['step']} | {goal['step_ms']} | {goal['allowed_us']:.0f} | "
        + " | ".join(f"{100 * goal[f'{name}_share']:.1f} %" for name in ("fused", "reordered", "official"))
        + " |"
        for goal in prediction["goals"]
    ]
    lines += [
        "",
        "## Kernels of the fused head, and the fidelity reduction",
        "",
        "| operator | shapes | launches | traffic kB | matrix MFLOP | vector MFLOP | floor us, each |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['case']} | {row['launches']} | {row['bytes'] / 1e3:.1f} | "
        f"{row['matrix_flops'] / 1e6:.1f} | {row['vector_flops'] / 1e6:.1f} | {row['floor_us']:.2f} |"
        for row in prediction["kernels"]
    ]
    return "\n".join(lines) + "\n"
