"""How long a build takes on this machine: what it computes is counted, and the machine's speed measured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from icexport.graphs.graph import Graph, example_inputs
from icexport.graphs.profile import Profile
from icexport.models.family import STABLE_DIFFUSION, Configs, Family
from icexport.models.precision import Precision
from icexport.models.sizes import size_multiple
from icexport.parity.cases import COUNTS, cases
from icexport.parity.real_cases import STEPS

# From the builds in benchmarks/results/cpu; a test holds the sum to what each of them took.
_SPEED = 0.7
"""Operations of whole models in a second, over those of ``icexport.host.speed.convolution_rate``."""
_LOWERED = 1.8
"""Time of PyTorch in float16 or bfloat16 with sums in float32, over its time in float32."""
_RANGE = 1.4
"""Time of a graph whose values are measured or rounded, over that of the graph as it is."""
_EXPORT = 25.0
"""Seconds of tracing, however small a model is."""
_WEIGHT = 1.1e-7
"""Seconds of reading, tracing, writing and hashing, for each weight."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a build, each counted once, whatever its precision.

    Attributes:
        reference: of PyTorch, on the different samples of the gate.
        gate: of the engines of one backend, on all rows of the gate.
        picture: of the picture that is drawn for its activations.
        ranges: of one look at the values of the first case and of that picture.
    """

    reference: float
    gate: float
    picture: float
    ranges: float

    @classmethod
    def of(cls, configs: Configs, profile: Profile, family: Family = STABLE_DIFFUSION) -> Work:
        """Count the work of a build for these sizes, on models without weights."""
        multiple = size_multiple(configs["unet"], configs["vae"])
        usual = {"rows": profile.height.opt // multiple, "columns": profile.width.opt // multiple}
        reference = gate = picture = ranges = 0.0
        for graph in importlib.import_module(family.graphs).outlines(configs):
            found = list(cases(graph, profile, multiple))
            different = {id(case.inputs): _operations(graph, case.inputs) for case in found}
            reference += sum(different.values())
            for case in found:
                samples = len(case.inputs[graph.inputs[0].name])
                gate += different[id(case.inputs)] * (len(case.rows) or samples) / samples
            one = profile.batch.min * _operations(
                graph, example_inputs(graph.inputs, usual | dict.fromkeys(COUNTS, 1))
            )
            stepped = graph.name != "vae_decoder"  # guided, and looked at in the first step and in the last
            picture += one * (2 * STEPS if stepped else 1)
            ranges += different[id(found[0].inputs)] + one * (4 if stepped else 1)
        return cls(reference, gate, picture, ranges)


def _operations(graph: Graph, inputs: Mapping[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph.module(*(inputs[spec.name].to("meta") for spec in graph.inputs))
    return int(counter.get_total_flops())


def seconds_needed(
    work: Work, weights: Mapping[str, int], dtype: Precision, rate: float, *, backends: int = 1, verify: bool = True
) -> float:
    """Return how long a build takes, apart from what TensorRT takes for its plans.

    Args:
        work: what is computed.
        weights: number of weights of each part of the model.
        dtype: precision of the bundle.
        rate: see ``icexport.host.speed.convolution_rate``.
        backends: number of backends.
        verify: whether the gate runs.
    """
    operations = 0.0
    if verify or dtype.overflows:
        operations += work.reference
    if verify:
        operations += dtype.reduced * _LOWERED * work.reference + work.gate * backends
    if dtype.overflows:
        operations += work.picture + 2 * _RANGE * work.ranges
    return _EXPORT + _WEIGHT * sum(weights.values()) + operations / (_SPEED * rate)
