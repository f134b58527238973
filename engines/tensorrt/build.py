"""Build a TensorRT plan from a typed ONNX file, in this process.

Precision is the file's: networks are strongly typed, and there is no flag that could change it. Use
``engines.tensorrt.worker`` to build in a process of its own, which a crash of the builder cannot take down.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engines.errors import BackendUnavailableError, EngineError
from engines.tensorrt.api import FLAVOURS, driver_problem, load
from engines.tensorrt.api import logger as make_logger
from engines.tensorrt.build_progress import make_progress_monitor
from engines.tensorrt.onnx_file import OnnxFile
from engines.tensorrt.plan import PlanReport, PlanRequest, Shapes
from engines.tensorrt.readback import engine_precision, network_plugins, network_precision

__all__ = ["PlanReport", "PlanRequest", "Shapes", "build_plan"]

logger = logging.getLogger(__name__)

_SEVERITIES = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
}
_QUOTED = 3
_NOISE = "catchCudaError"  # without a driver, TensorRT-RTX adds such a line to every other error
OUT_OF_MEMORY = re.compile(
    # "temporarily unavailable" is what a thread gets that finds no memory for its stack
    r"out ?of ?memory|bad_alloc|cannot allocate|alloc\w* fail|fail\w* to alloc|resource temporarily unavailable",
    re.IGNORECASE,
)
"""How the libraries say that memory, of either kind, is at an end."""

_WAYS_OUT = (
    (
        OUT_OF_MEMORY,
        "The builder ran out of memory: free some, or build smaller shapes",
    ),
    (
        re.compile(r"failed to import initializer", re.IGNORECASE),
        "The weights could not be read: free memory, or export the graph again",
    ),
    (
        re.compile(r"not supported by a dedicated kernel"),
        "TensorRT has no kernel for attention with heads this narrow: export at opset 21, where attention is MatMul "
        "and Softmax",
    ),
    (
        re.compile(r"could not find any implementation", re.IGNORECASE),
        "No kernel fits the limits: raise the workspace limit or leave it out",
    ),
)


class _Journal:
    """Keeps what the library says, and passes it on to the log."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def note(self, severity: str, text: str) -> None:
        level = _SEVERITIES.get(severity, logging.DEBUG)
        logger.log(level, "%s", text)
        if level == logging.WARNING:
            self.warnings.append(text)
        elif level == logging.ERROR:
            self.errors.append(text)

    def failure(self, what: str) -> EngineError:
        """Return an error with the last things the library complained of, and the way out of those that are known."""
        errors = [text for text in dict.fromkeys(self.errors) if _NOISE not in text] or self.errors
        said = "; ".join(errors[-_QUOTED:]) or "it gave no reason"
        return EngineError(f"{what}: {said.strip()}. {_way_out(said)}.")


def _way_out(said: str, otherwise: str = "Export the graph at another opset, or use backend 'onnxruntime'") -> str:
    return next((way for pattern, way in _WAYS_OUT if pattern.search(said)), otherwise)


def build_plan(request: PlanRequest, progress: Callable[[str, float], None]) -> PlanReport:
    """Build a plan in this process and write it.

    Args:
        request: what to build.
        progress: called with what is being done and the fraction done, 0 to 1. An exception that it raises stops the
            builder at the next occasion, and is raised again from here.

    Raises:
        BackendUnavailableError: if the library is missing or too old, or cannot start here.
        EngineError: if the ONNX file or its data are damaged, TensorRT does not take the graph, the build fails, or
            what was built is not what was asked for. No plan is written then.
    """
    module = load(request.flavour)
    source = OnnxFile(request.onnx)
    if request.plugins:
        from engines.kernels.plugins import register  # imports torch, which all other builds do without

        register(module, request.plugins)
    journal = _Journal()
    trt_logger = make_logger(module, journal.note)
    builder = _start(module, trt_logger, journal)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = _configure(module, builder, request, journal)

    progress("parsing", 0.0)
    started = time.monotonic()
    _parse(module, network, trt_logger, source)
    parsed = time.monotonic()
    precision = network_precision(network, source, request.dtype)
    plugins = network_plugins(module, network, source, request.plugins)
    _add_profiles(builder, config, network, request.profiles)

    plan = _run(module, builder, network, config, journal, progress)
    built = time.monotonic()
    progress("reading back", 1.0)
    layers, read_from = network.num_layers, "network"
    engine = _engine(module, plan, trt_logger, journal, request)
    if engine is not None:
        nodes = sum(len(source.plugin_nodes(plugin)) for plugin in plugins)
        precision = engine_precision(module, engine, source, request.dtype, nodes)
        layers, read_from = engine.num_layers, "engine"
    _write(request.plan, plan)
    if request.timing_cache is not None:
        _write(request.timing_cache, config.get_timing_cache().serialize())
    return PlanReport(
        flavour=request.flavour,
        version=str(module.__version__),
        targets=request.targets,
        parse_seconds=parsed - started,
        build_seconds=built - parsed,
        peak_memory_bytes=_peak_memory(),
        plan_bytes=plan.nbytes,
        layers=layers,
        precision=precision,
        plugins=plugins,
        read_from=read_from,
        warnings=tuple(dict.fromkeys(journal.warnings)),
    )


def _start(module: Any, trt_logger: Any, journal: _Journal) -> Any:
    try:
        with _no_collection():
            return module.Builder(trt_logger)
    except (TypeError, RuntimeError) as error:  # how the bindings say that the library returned no object
        reason = "; ".join(journal.errors) or str(error)
        raise BackendUnavailableError(
            f"{module.__name__} {module.__version__} cannot start a builder: {reason}. Check the GPU and its driver "
            "with nvidia-smi."
        ) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing objects in cycles meanwhile.

    The library holds its lock while it makes a builder, and logs through Python. If the collector ran there and freed
    an older builder, that one would wait for the same lock for ever.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _configure(module: Any, builder: Any, request: PlanRequest, journal: _Journal) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # without it the precision cannot be read back
    config.builder_optimization_level = request.optimization_level
    if config.builder_optimization_level != request.optimization_level:
        raise journal.failure(f"{module.__name__} refuses optimisation level {request.optimization_level}")
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.timing_cache is not None:
        _use_timing_cache(config, request.timing_cache, journal)
    targets = sorted(set(request.targets))
    if targets:
        config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not config.set_compute_capability(module.ComputeCapability(target), index):
            known = [int(member) for member in module.ComputeCapability.__members__.values()]
            supported = ", ".join(f"sm_{capability}" for capability in known if capability >= 10)
            raise EngineError(
                f"{module.__name__} {module.__version__} cannot build for sm_{target}; it knows {supported}. For "
                "another GPU, such as a Hopper (sm_90), build with classic TensorRT (backend 'tensorrt') on that GPU."
            )
    return config


def _use_timing_cache(config: Any, path: Path, journal: _Journal) -> None:
    """Give the builder the timings of earlier builds; those that are damaged, or not of this GPU, count as none."""
    try:
        saved = path.read_bytes()
    except FileNotFoundError:
        saved = b""
    except OSError as error:
        raise EngineError(f"cannot read the timing cache {path}: {error}. Choose another file.") from error
    cache = config.create_timing_cache(saved)
    if cache is None or not config.set_timing_cache(cache, False):
        journal.note("WARNING", f"the timing cache {path} is damaged or of another GPU or version: it is written anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _parse(module: Any, network: Any, trt_logger: Any, source: OnnxFile) -> None:
    parser = module.OnnxParser(network, trt_logger)
    if parser.parse_from_file(str(source.path)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    refused = []
    for error in errors:
        code = str(error.code()).rpartition(".")[2]  # in 10.9 the name of this enum is a method
        # A check that is a mere "false" is spelled out by its code alone.
        reason = f"{code}: {error.desc()}" if error.desc() not in ("", "false") else code
        refused.append(f"{source.describe(error.node(), error.node_name())}: {reason}")
    listed = "; ".join(dict.fromkeys(refused)) or "no reason given"
    way = (
        "Export the graph at another opset or without this op, or use backend 'onnxruntime', which takes the same file"
    )
    if any(source.is_custom(error.node(), error.node_name()) for error in errors):
        way = "An op that is not of ONNX itself needs a plugin: ask for it, or build from a graph without it"
    name = f"{module.__name__} {module.__version__}"
    raise EngineError(f"{name} does not take {source.path.name}: {listed}. {_way_out(listed, way)}.")


def _add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Mapping[str, Shapes]]) -> None:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    free = {tensor.name: tuple(tensor.shape) for tensor in tensors if -1 in tuple(tensor.shape)}
    if free and not profiles:
        raise EngineError(
            f"{', '.join(free)} have free axes: give at least one optimisation profile with their shapes."
        )
    for number, profile in enumerate(profiles):
        problems = [f"{name} is missing" for name in free if name not in profile]
        problems += [f"{name} is not an input with free axes" for name in profile if name not in free]
        problems += [
            f"{name} is {shape} in the graph, {wanted} in the profile"
            for name, shape in free.items()
            for wanted in profile.get(name, ())
            if len(shape) != len(wanted)
            or any(size not in (-1, want) for size, want in zip(shape, wanted, strict=True))
        ]
        if problems:
            raise EngineError(f"optimisation profile {number} does not fit the graph: {'; '.join(problems)}.")
        if profile:
            added = builder.create_optimization_profile()
            for name, shapes in profile.items():
                added.set_shape(name, *shapes)
            if config.add_optimization_profile(added) < 0:
                raise EngineError(f"TensorRT refuses optimisation profile {number}: {dict(profile)}.")


def _run(
    module: Any,
    builder: Any,
    network: Any,
    config: Any,
    journal: _Journal,
    progress: Callable[[str, float], None],
) -> Any:
    """Build, and return the plan in the library's own memory: a copy would double the peak."""
    monitor = make_progress_monitor(module, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise journal.failure(f"{module.__name__} {module.__version__} could not build the engine")
    return plan


def _engine(module: Any, plan: Any, trt_logger: Any, journal: _Journal, request: PlanRequest) -> Any | None:
    """Load the plan again, to read it back; None where this machine's GPU cannot load it."""
    if FLAVOURS[request.flavour].cross_builds and driver_problem() is not None:
        return None
    runtime = module.Runtime(trt_logger)
    if hasattr(runtime, "get_engine_validity"):  # TensorRT-RTX: a plan may be for other GPUs than this machine's
        validity, _ = runtime.get_engine_validity(plan)
        if validity == module.EngineValidity.INVALID:
            return None
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise journal.failure("the plan that was just built cannot be loaded")
    return engine


def _write(path: Path, data: Any) -> None:
    """Write a file under its name only when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        raise EngineError(
            f"cannot write {path}: {error}. Check the folder, its permissions and the free space."
        ) from error
    finally:
        with suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def _peak_memory() -> int | None:
    """Return the largest resident memory of this process, in bytes; Linux only."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    # Not resource.getrusage: there a child starts with the peak of the process that started it.
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)
