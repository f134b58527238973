"""A float16 or bfloat16 graph as a GPU computes it, on a CPU: sums in float32, every value rounded.

ONNX Runtime on a CPU has few kernels for float16 and bfloat16. It computes float16 graphs in float32 and leaves out
the rounding between neighbours, which hides overflows and lost digits. Graphs in bfloat16 it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor

from engines.base import TensorSpec, check_inputs, select_outputs
from icexport.export.widen import ROUNDED, rounding, values_of
from icexport.models.precision import Precision
from icexport.parity.session import open_session, run_session


class SimulatedEngine:
    """Runs a graph of low precision in ONNX Runtime on the CPU, with the rounding of that precision.

    Its inputs and outputs are float32 and hold rounded numbers.

    Args:
        name: name of the graph.
        model: the graph without its weights.
        folder: folder where its weights are.
        inputs: specs of the inputs, in any float type.
        outputs: specs of the outputs, in any float type.
        dtype: precision of the graph, less than float32.
    """

    backend = "simulation"

    def __init__(
        self,
        name: str,
        model: onnx.ModelProto,
        folder: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        dtype: Precision,
    ) -> None:
        self.name = name
        self.device = torch.device("cpu")
        self.inputs, self.outputs = (
            tuple(replace(s, dtype=torch.float32) if s.dtype.is_floating_point else s for s in specs)
            for specs in (inputs, outputs)
        )
        kind = onnx.TensorProto.DataType.Value(dtype.onnx_name.upper())
        self.model = rounding(model, kind)
        low = values_of(model, kind)
        values = [spec.name + ROUNDED if spec.name in low else spec.name for spec in outputs]
        self._session = open_session(self.model, values, folder, frugal=True)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the graph once; see ``engines.Engine``."""
        check_inputs(self, inputs)
        found = run_session(self._session, inputs)
        results = {spec.name: torch.from_numpy(value) for spec, value in zip(self.outputs, found, strict=True)}
        return {name: results[name] for name in select_outputs(self, outputs)}

    def close(self) -> None:
        """Free the session."""
        del self._session
