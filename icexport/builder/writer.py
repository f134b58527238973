"""Everything of a bundle, written into an empty folder: graphs, engines, small parts, manifest, parity."""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from icexport import conditions
from icexport.backends import table
from icexport.backends.base import EngineRequest, make_engine
from icexport.builder.mixed import stabilise
from icexport.builder.options import BuildSpec
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.manifest import PROBE_FOLDER, Manifest
from icexport.bundle.records import ConditionInfo, EngineEntry, GraphEntry, SourceInfo, Stamps
from icexport.bundle.store import Bundle, files_of
from icexport.errors import ExportError
from icexport.export.onnx import export_graph
from icexport.export.plugins import export_plugin_graph
from icexport.export.precision import read_precision
from icexport.gates.parity_gate import expect_graph, parity_gate, write_report
from icexport.graphs.graph import Graph, describe
from icexport.graphs.split import split
from icexport.host import memory
from icexport.host.files import Hashes, Stamp
from icexport.host.versions import versions
from icexport.models.precision import REFERENCE, precision
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME
from icexport.models.sizes import size_multiple
from icexport.parity.compare import FACTOR, MIN_COSINE, Expected
from icexport.parity.real_cases import real_cases
from icexport.progress import Progress
from icexport.runtime.schedulers import settle_scheduler

logger = logging.getLogger(__name__)

_SEEDED_CASES = 1


def write_bundle(spec: BuildSpec, key: str, folder: Path, store: EngineStore, progress: Progress) -> None:
    """Write one bundle.

    Args:
        spec: what to build.
        key: key of the bundle.
        folder: an empty folder.
        store: where engines are kept for other bundles.
        progress: told what is being done.

    Errors are those of ``icexport.build``.
    """
    _Writer(spec, folder, store, progress).write(key)


class _Writer:
    def __init__(self, spec: BuildSpec, folder: Path, store: EngineStore, progress: Progress) -> None:
        self._spec = spec
        self._folder = folder
        self._store = store
        self._progress = progress
        self._precision = precision(spec.dtype)
        self._multiple = size_multiple(spec.source.config("unet"), spec.source.config("vae"))
        self._symbols = spec.profile.symbols(self._multiple)
        self._hashes = Hashes()
        self._expected: dict[str, list[Expected]] = {}

    def write(self, key: str) -> None:
        (self._folder / "graphs").mkdir()
        entries: dict[str, GraphEntry] = {}
        engines: dict[str, EngineEntry] = {}
        spec = self._spec
        backends = [table.get(name) for name in spec.backends]
        from_module = [backend for backend in backends if backend.from_module]
        for graph, real in self._graphs():
            lowered = graph.cast(self._precision.torch) if self._has_reference and self._precision.reduced else graph
            entry = self._export(lowered)
            if self._has_reference:
                self._expect(graph, lowered)
            module = lowered if from_module else None
            del lowered
            _release()
            if real is not None:
                entry = self._move_islands(entry, graph, real)
            entries[graph.name] = entry
            for backend in from_module:
                engines |= make_engine(backend, self._request(graph.name, entry, module))
            del graph, module, real
            _release()
        self._progress("hash the files")
        # Only now: the models are out of memory, which a builder needs for itself.
        for backend in (b for b in backends if not b.from_module):
            for name, entry in entries.items():
                engines |= make_engine(backend, self._request(name, entry))
        self._copy_small_parts()
        manifest = self._manifest(key, entries, engines)
        self._finish(manifest)
        if spec.verify:
            bundle = Bundle(self._folder, self._hashes)
            manifest.parity = parity_gate(bundle, spec.source, self._expected, spec.backends, self._progress)
            write_report(bundle, manifest.parity)
            self._finish(manifest)
        spec.source.check_unchanged()

    @property
    def _has_reference(self) -> bool:
        """Whether the graphs come in float32 first: for the gate, or to find what float16 cannot carry."""
        return self._spec.verify or self._precision.overflows

    def _graphs(self) -> Iterator[tuple[Graph, list[Expected] | None]]:
        """Return the graphs; whoever takes one is the only one to hold it.

        Where some values may be too large for the precision of the build, each comes with cases of a real picture, by
        which these values are found.
        """
        spec = self._spec
        if not self._precision.overflows:
            dtype = REFERENCE.torch if self._has_reference else self._precision.torch
            # Not a loop, whose variable would hold a graph while the next one is loaded.
            return map(lambda graph: (graph, None), split(spec.source, dtype, spec.profile))  # noqa: C417
        # The picture needs all graphs at once. They are loaded again one by one afterwards: what is made of one needs
        # the memory of the others.
        real = real_cases(
            list(split(spec.source, REFERENCE.torch, spec.profile)), spec.source, spec.profile, self._progress
        )
        _release()
        return map(lambda graph: (graph, real.pop(graph.name)), split(spec.source, REFERENCE.torch, spec.profile))  # noqa: C417

    def _expect(self, graph: Graph, lowered: Graph) -> None:
        """Keep what the graph's engines have to compute, while its weights are in memory."""
        own = lowered if self._precision.reduced and self._spec.verify else None
        profile = self._spec.profile
        self._expected[graph.name] = expect_graph(graph, own, self._precision, profile, self._multiple, self._progress)

    def _request(self, name: str, entry: GraphEntry, module: Graph | None = None) -> EngineRequest:
        spec = self._spec
        return EngineRequest(
            graph=name,
            entry=entry,
            folder=self._folder,
            dtype=spec.dtype,
            profile=spec.profile,
            multiple=self._multiple,
            options=spec.plans,
            store=self._store,
            hashes=self._hashes,
            progress=self._progress,
            module=module,
        )

    def _export(self, graph: Graph) -> GraphEntry:
        self._progress(f"export {graph.name}")
        started = time.perf_counter()
        file, opset = f"graphs/{graph.name}.onnx", self._spec.opset
        export_graph(graph, self._folder / file, self._symbols, opset)
        plugin_file: str | None = None
        plugins: tuple[str, ...] = ()
        if graph.name == "probe" and self._spec.plugins:
            plugin_file = "graphs/probe.plugins.onnx"
            plugins = export_plugin_graph(graph, self._folder / plugin_file, self._symbols, opset)
        logger.debug("Exported %s in %.1f s", graph.name, time.perf_counter() - started)
        dtypes = read_precision(self._folder / file, self._precision)
        inputs, outputs = describe(graph.inputs), describe(graph.outputs)
        return GraphEntry(file, inputs, outputs, dtypes, plugin_file=plugin_file, plugins=plugins)

    def _move_islands(self, entry: GraphEntry, reference: Graph, real: list[Expected]) -> GraphEntry:
        """Move the parts of an exported graph to float32 that its precision cannot carry."""
        self._progress(f"float16 range of {reference.name}")
        path = self._folder / entry.file
        seeded = self._expected[reference.name][:_SEEDED_CASES]
        islands = stabilise(path, reference, [*seeded, *real], self._precision, self._progress)
        if islands and entry.plugin_file:
            raise ExportError(
                f"{reference.name} needs float32 for {', '.join(island.scope for island in islands)}, which its "
                "kernels cannot give. Build with --no-plugins."
            )
        dtypes = read_precision(path, self._precision)
        return replace(entry, dtypes=dtypes, islands=[island.to_json() for island in islands])

    def _copy_small_parts(self) -> None:
        """Copy tokenizer, scheduler, feature extractor, and the probe for kernels outside of the engines."""
        source = self._spec.source
        if source.probe is not None and source.probe.folder is not None:
            (self._folder / PROBE_FOLDER).mkdir()
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(source.probe.folder / name, self._folder / PROBE_FOLDER / name)
        for part, folder in source.base.folders.items():
            shutil.copytree(folder, self._folder / part, copy_function=shutil.copyfile)
        settle_scheduler(self._folder / "scheduler", source.config("scheduler")["_class_name"])
        if (source.base.path / "safety_checker").is_dir():
            logger.warning(
                "The model has a safety checker, which is not exported: give one to InnerControlPipeline."
                "from_pretrained(..., safety_checker=...) where you need it."
            )

    def _manifest(self, key: str, entries: dict[str, GraphEntry], engines: dict[str, EngineEntry]) -> Manifest:
        source, spec = self._spec.source, self._spec
        parts = ["text_encoder", "controlnet", "unet", "vae", *(["probe"] if source.probe else [])]
        configs = {part: source.full_config(part) for part in parts}
        return Manifest(
            key=key,
            condition=ConditionInfo(**conditions.get(source.condition).describe()),
            source=SourceInfo(family=source.family.name, **asdict(source.names), files=source.files),
            dtype=spec.dtype,
            opset=spec.opset,
            profile=spec.profile,
            graphs=entries,
            configs=configs | {"scheduler": source.config("scheduler")},
            engines=engines,
            files={},
            tolerances={"cosine": MIN_COSINE, "factor": FACTOR, "floor": self._precision.floor},
            parity={},
            versions=versions(),
        )

    def _finish(self, manifest: Manifest) -> None:
        """Write the manifest for what is in the folder now; files that it had already are not read again."""
        source, now, files = self._spec.source, time.time_ns(), files_of(self._folder)
        manifest.files = {name: self._hashes(path) for name, path in files.items()}
        # Nobody else writes into this folder, so that a stamp taken now will do for what has had time to settle.
        own = {name: stamp for name, path in files.items() if (stamp := Stamp.of(path)).settled(now)}
        theirs = {name: found for name, path in source.paths.items() if (found := source.hashes.settled(path))}
        manifest.stamps = Stamps(theirs, own)
        manifest.write(self._folder)


def _release() -> None:
    """Free what nobody holds any more; modules are in cycles, so that it takes a collection."""
    gc.collect()
    memory.release()
