"""Everything of a bundle, written into an empty folder: graphs, engines, small parts, manifest, parity."""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from engines import registry
from icexport import conditions
from icexport.backends.plans import build_plan
from icexport.backends.torch_eager import save_torch
from icexport.builder.mixed import stabilise
from icexport.builder.options import BuildSpec
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.manifest import PROBE_FOLDER, EngineEntry, GraphEntry, Manifest, key_parts
from icexport.bundle.store import Bundle, hash_files
from icexport.errors import ExportError
from icexport.export.onnx import export_graph
from icexport.export.plugins import export_plugin_graph
from icexport.export.precision import read_precision
from icexport.gates.parity_gate import parity_gate, write_report
from icexport.graphs.graph import Graph, describe, specs
from icexport.graphs.split import split
from icexport.host.files import digest, sha256
from icexport.host.versions import versions
from icexport.models.dtypes import torch_dtype
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME
from icexport.models.sizes import size_multiple
from icexport.parity.cases import Case, cases
from icexport.parity.compare import FACTOR, FLOOR, MIN_COSINE
from icexport.parity.real_cases import real_cases
from icexport.progress import Progress

logger = logging.getLogger(__name__)

_SEEDED_CASES = 3


class BundleWriter:
    """Writes one bundle.

    Args:
        spec: what to build.
        key: of the bundle.
        folder: an empty one.
        store: where TensorRT plans are kept for other bundles.
        progress: told what is being done.
    """

    def __init__(self, spec: BuildSpec, key: str, folder: Path, store: EngineStore, progress: Progress) -> None:
        self._spec = spec
        self._key = key
        self._folder = folder
        self._store = store
        self._progress = progress
        self._multiple = size_multiple(spec.source.config("unet"), spec.source.config("vae"))
        self._symbols = spec.profile.symbols(self._multiple)
        self._plugins: tuple[str, ...] = ()

    def write(self) -> None:
        """Write all of it; the errors are those of ``icexport.build``."""
        (self._folder / "graphs").mkdir()
        entries: dict[str, GraphEntry] = {}
        engines: dict[str, EngineEntry] = {}
        spec = self._spec
        mixed = spec.dtype == "fp16"
        graphs = split(spec.source, "fp32" if mixed else spec.dtype)
        real: dict[str, list[Case]] = {}
        if mixed:
            self._progress("draw a picture for its activations")
            held = list(graphs)  # the picture needs all of them at once; each is let go once it is exported
            real = real_cases(held, spec.source, spec.profile)
            graphs = _handed_out(held)
        for graph in graphs:
            entries[graph.name], made = self._graph(graph, real.get(graph.name))
            engines |= made
            del graph
            gc.collect()
        # Only now: the models are out of memory, which the builder needs for itself.
        for backend in spec.plan_backends:
            for name, entry in entries.items():
                engines |= self._plan(name, entry, backend)
        self._copy_small_parts()
        manifest = self._manifest(entries, engines)
        manifest.write(self._folder)
        if spec.verify:
            bundle = Bundle(self._folder)
            manifest.parity = parity_gate(bundle, spec.source, spec.backends, self._progress)
            write_report(bundle, manifest.parity)
            manifest.files = hash_files(self._folder)
            manifest.write(self._folder)

    def _graph(self, graph: Graph, real: list[Case] | None) -> tuple[GraphEntry, dict[str, EngineEntry]]:
        """One graph's file, and the engines that are made from its module.

        Args:
            graph: in the precision of the build; in float32 where ``real`` is given.
            real: inputs of a real picture, by which the parts are found that float16 cannot carry.
        """
        lowered = graph if real is None else graph.cast(torch_dtype(self._spec.dtype))
        entry = self._export(lowered)
        if real is not None:
            entry = self._move_islands(entry, graph, real)
        engines: dict[str, EngineEntry] = {}
        for backend in self._spec.backends:
            if backend not in self._spec.plan_backends:
                engines |= self._engine(lowered, entry, backend)
        return entry, engines

    def _export(self, graph: Graph) -> GraphEntry:
        self._progress(f"export {graph.name}")
        started = time.perf_counter()
        file = f"graphs/{graph.name}.onnx"
        export_graph(graph, self._folder / file, self._symbols, self._spec.opset)
        plugin_file = None
        if graph.name == "probe" and "tensorrt" in self._spec.backends and self._spec.plans.plugins:
            plugin_file = "graphs/probe.plugins.onnx"
            path = self._folder / plugin_file
            self._plugins = export_plugin_graph(graph, path, self._symbols, self._spec.opset)
        logger.debug("Exported %s in %.1f s", graph.name, time.perf_counter() - started)
        inputs, outputs = ([describe(spec) for spec in side] for side in (graph.inputs, graph.outputs))
        dtypes = read_precision(self._folder / file, self._spec.dtype)
        return GraphEntry(file, inputs, outputs, dtypes, plugin_file=plugin_file)

    def _move_islands(self, entry: GraphEntry, reference: Graph, real: list[Case]) -> GraphEntry:
        """Move the parts of an exported graph to float32 that float16 cannot carry; seeded and real inputs judge."""
        self._progress(f"float16 range of {reference.name}")
        seeded = islice(cases(reference, self._spec.profile, self._multiple), _SEEDED_CASES)
        path = self._folder / entry.file
        islands = stabilise(path, reference, [*seeded, *real], self._spec.dtype)
        if islands and entry.plugin_file:
            raise ExportError(
                f"{reference.name} needs float32 for {', '.join(island.scope for island in islands)}, which its "
                "kernels cannot give. Build with --no-plugins."
            )
        dtypes = read_precision(path, self._spec.dtype)
        return replace(entry, dtypes=dtypes, islands=[island.to_json() for island in islands])

    def _engine(self, graph: Graph, entry: GraphEntry, backend: str) -> dict[str, EngineEntry]:
        """The entry of one engine by its key, with its files written where the backend needs files of its own."""
        data = self._folder / f"{entry.file}.data"
        version = registry.check(backend).version or ""
        parts = key_parts(
            graph_hash=sha256(self._folder / entry.file),
            weights_hash=sha256(data) if data.exists() else "",
            profile=self._spec.profile,
            dtype=self._spec.dtype,
            backend=backend,
            version=version,
            device="any",  # neither ONNX Runtime's nor PyTorch's files depend on the device
        )
        key = digest(parts)
        files: list[str] = []
        if backend == "torch":
            folder = self._folder / "engines" / key
            save_torch(graph, folder)
            files = sorted(p.relative_to(self._folder).as_posix() for p in folder.iterdir())
        return {key: EngineEntry(graph.name, backend, version, files)}

    def _plan(self, name: str, entry: GraphEntry, backend: str) -> dict[str, EngineEntry]:
        plugins = self._plugins if entry.plugin_file and backend == "tensorrt" else ()
        file = entry.plugin_file if plugins else entry.file
        return build_plan(
            name,
            self._folder / str(file),
            specs(entry.inputs),
            backend=backend,
            dtype=self._spec.dtype,
            profile=self._spec.profile,
            multiple=self._multiple,
            options=self._spec.plans,
            plugins=plugins,
            store=self._store,
            folder=self._folder,
            progress=self._progress,
        )

    def _copy_small_parts(self) -> None:
        """Tokenizer, scheduler, feature extractor, and the probe for kernels outside of the engines, as they are."""
        source = self._spec.source
        if source.probe_folder is not None:
            (self._folder / PROBE_FOLDER).mkdir()
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(source.probe_folder / name, self._folder / PROBE_FOLDER / name)
        for part in ("tokenizer", "scheduler", "feature_extractor"):
            if (source.base / part).is_dir():
                shutil.copytree(source.base / part, self._folder / part, copy_function=shutil.copyfile)
        if (source.base / "safety_checker").is_dir():
            logger.warning(
                "The model has a safety checker, which is not exported: give one to InnerControlPipeline."
                "from_pretrained(..., safety_checker=...) where you need it."
            )

    def _manifest(self, entries: dict[str, GraphEntry], engines: dict[str, EngineEntry]) -> Manifest:
        source, spec = self._spec.source, self._spec
        parts = ["text_encoder", "controlnet", "unet", "vae", *(["probe"] if source.probe_folder else [])]
        return Manifest(
            key=self._key,
            condition=conditions.get(source.condition).describe(),
            source=source.describe(),
            dtype=spec.dtype,
            opset=spec.opset,
            profile=spec.profile,
            graphs=entries,
            configs={part: source.full_config(part) for part in parts},
            engines=engines,
            files=hash_files(self._folder),
            tolerances={"cosine": MIN_COSINE, "factor": FACTOR, "floor": FLOOR[spec.dtype]},
            parity={},
            versions=versions(),
        )


def _handed_out(graphs: list[Graph]) -> Iterator[Graph]:
    """Each graph once; whoever takes it is the only one that holds it."""
    while graphs:
        yield graphs.pop(0)
