"""The parts of a manifest: condition, source, graphs, engines, parity, stamps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from icexport.graphs.shapes import TensorInfo
from icexport.host.files import Stamp


@dataclass(frozen=True)
class ConditionInfo:
    """What the control maps of a bundle show.

    Attributes:
        name: name of the condition.
        value_range: range of a control map's values.
        polarity: what is bright in it.
        metric: metric of the score, with ``unit`` and ``higher_is_better``.
        unit: unit of the score.
        higher_is_better: whether a higher score is better.
    """

    name: str
    value_range: tuple[float, float]
    polarity: str
    metric: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class SourceInfo:
    """The model that a bundle was made from.

    Attributes:
        family: name of the model family.
        model: base model as given: ``reference``, a folder or a Hub id.
        controlnet: ControlNet as given, likewise; None: beside the base model.
        probe: probe as given, likewise; ``none``: no probe.
        files: SHA-256 of every file of the model, by ``part/file``.
        vae: autoencoder as given, likewise; None: the base model's.
        variant: variant of the weights as given.
        model_config: where the configs of a single file are, as given.
    """

    family: str
    model: str
    controlnet: str | None
    probe: str | None
    files: dict[str, str]
    vae: str | None = None
    variant: str | None = None
    model_config: str | None = None

    @property
    def names(self) -> dict[str, str | None]:
        """What the user called the parts, as options of ``icexport.build``."""
        options = ("model", "controlnet", "probe", "vae", "variant", "model_config")
        return {name: getattr(self, name) for name in options}


@dataclass(frozen=True)
class GraphEntry:
    """One ONNX graph of the bundle.

    Attributes:
        file: path in the bundle; the weights are in ``<file>.data`` where there are any.
        inputs: inputs of the graph.
        outputs: outputs of the graph.
        dtypes: number of weights of each element type, read back from the written file.
        islands: what was moved to float32 in a graph of lower precision, with the evidence.
        plugin_file: path of the same graph with plugins as custom nodes; None where there is none.
        plugins: names of these plugins.
    """

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    dtypes: dict[str, int]
    islands: list[dict[str, Any]] = field(default_factory=list)
    plugin_file: str | None = None
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineEntry:
    """One engine: a graph made ready for a backend.

    Attributes:
        graph: name of the graph.
        backend: name of the backend.
        version: version of the backend when the engine was built.
        files: paths in the bundle that only this engine needs; empty where the backend runs the ONNX file itself.
        device: what it was built for, e.g. ``sm_86+sm_89``; ``any`` if it does not matter.
        made_from: what the engine's key is the digest of; see ``key_parts``.
        report: what the builder told: seconds, memory, precision and plugins read back; empty if nothing was built.
    """

    graph: str
    backend: str
    version: str
    files: list[str] = field(default_factory=list)
    device: str = "any"
    made_from: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParityResult:
    """How one output of one graph on one backend compared with PyTorch in float32, in its worst case.

    Attributes:
        passed: whether the output is close enough.
        cosine: cosine similarity to the reference.
        relative_error: RMS of the difference over the RMS of the reference; None: not finite.
        allowed_error: the error that would just have passed; None: not finite.
        worst_case: name of the inputs with the worst result.
        finite: whether the output is there, of the right shape, and finite.
    """

    passed: bool
    cosine: float
    relative_error: float | None
    allowed_error: float | None
    worst_case: str
    finite: bool


Parity = dict[str, dict[str, dict[str, ParityResult]]]
"""Results of the parity gate by backend, graph and output."""


def parity_json(results: Parity) -> dict[str, Any]:
    """Return the results of the parity gate as plain dictionaries."""
    return {
        backend: {graph: {n: asdict(output) for n, output in outputs.items()} for graph, outputs in graphs.items()}
        for backend, graphs in results.items()
    }


def parity_from_json(data: Mapping[str, Any]) -> Parity:
    """Return the inverse of ``parity_json``."""
    return {
        backend: {
            graph: {name: ParityResult(**output) for name, output in outputs.items()}
            for graph, outputs in graphs.items()
        }
        for backend, graphs in data.items()
    }


@dataclass(frozen=True)
class Stamps:
    """Sizes and times of files whose hashes are in the manifest: where they are unchanged, a cache hit reads nothing.

    Files that had just been changed have none.

    Attributes:
        source: stamps of the model's files, by ``part/file``.
        files: stamps of the bundle's files, by POSIX path.
    """

    source: dict[str, Stamp]
    files: dict[str, Stamp]
