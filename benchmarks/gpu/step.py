"""Phases of the GPU suite about one denoising step at the size of Stable Diffusion 1.5, with random weights."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from benchmarks.gpu import measure
from benchmarks.gpu.measure import at_most
from benchmarks.gpu.models import need
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Bench
from benchmarks.sd15 import VAE_CONFIG, fill_zeros, sd15_graph, sd15_unet, sd15_unet_config
from engines.base import Engine
from engines.kernels import SPECS
from engines.kernels.spec import Case
from engines.torch_eager import TorchEngine
from icexport.backends import table
from icexport.backends.plans import optimisation_profiles
from icexport.export.onnx import export_graph
from icexport.graphs.graph import describe, example_inputs
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.stable_diffusion import controlnet_graph, unet_graph
from icexport.models.probe import ProbeConfig
from icexport.models.sizes import size_multiple
from icexport.models.taps import Taps
from icexport.runtime.step import Deferred, StepGraphs

_TEXT_LENGTH = 77
_STEP_MS, _COST_FACTOR, _HEAD_SHARE = 8.5, 1.40, 0.03
_CALLS = 50
_CHECKED = Case(1, (3, 64, 64), (3, 512, 512))


@dataclass(frozen=True)
class Models:
    """UNet and ControlNet with random weights, their engines, and inputs for two pictures (guidance)."""

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    engines: tuple[Engine, Engine]
    inputs: dict[str, Tensor]

    def diffusers(self, controlnet: Any, unet: Any) -> Tensor:
        """Return a step as diffusers' pipeline makes it."""
        common = {"encoder_hidden_states": self.inputs["prompt_embeds"], "return_dict": False}
        where = self.inputs["sample"], self.inputs["timestep"]
        down, mid = controlnet(*where, controlnet_cond=self.inputs["control_map"], **common)
        noise: Tensor = unet(
            *where, down_block_additional_residuals=down, mid_block_additional_residual=mid, **common
        )[0]
        return noise

    def unet_alone(self) -> Tensor:
        """Return a step without a ControlNet."""
        noise: Tensor = self.unet(
            self.inputs["sample"],
            self.inputs["timestep"],
            encoder_hidden_states=self.inputs["prompt_embeds"],
            return_dict=False,
        )[0]
        return noise


def make_models(context: Context) -> Models:
    """Make the models: float16 on a GPU, tiny and float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.float16 if context.cuda else torch.float32
    with torch.device(context.device):
        unet = sd15_unet() if context.cuda else _tiny_unet()
        embedding = {} if context.cuda else {"conditioning_embedding_out_channels": (8, 16)}
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False, **embedding)
    fill_zeros(controlnet)
    unet, controlnet = unet.to(dtype).eval(), controlnet.to(dtype).eval()
    factor = 8 if context.cuda else 2
    made = (
        controlnet_graph(controlnet, _TEXT_LENGTH, factor, dtype),
        unet_graph(unet, _TEXT_LENGTH, ProbeConfig(Taps(unet).dims), dtype),
    )
    engines = [TorchEngine(g.name, g.module, g.inputs, g.outputs, context.device) for g in made]
    cells = 8 if context.cuda else 4  # 64 x 64, or 8 x 8, in the multiples that the graphs count in
    inputs = example_inputs(made[0].inputs, {"samples": 2, "rows": cells, "columns": cells})
    on_device = {name: tensor.to(context.device) for name, tensor in inputs.items()}
    return Models(unet, controlnet, (engines[0], engines[1]), on_device)


def _tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def engine_step(controlnet: Engine, unet: Engine, inputs: dict[str, Tensor]) -> Tensor:
    """Return a step through two engines."""
    shared = {name: inputs[name] for name in ("sample", "timestep", "prompt_embeds")}
    return unet({**shared, **controlnet(inputs)}, ["noise_pred"])["noise_pred"]


def graphed_step(graphs: StepGraphs, inputs: dict[str, Tensor]) -> Tensor:
    """Return a step through two engines as ``InnerControlPipeline(cuda_graph=True)`` makes it."""
    shared = {name: inputs[name] for name in ("sample", "timestep", "prompt_embeds")}
    return graphs(shared, Deferred(inputs), ["noise_pred"])["noise_pred"]


class _Steps:
    """Times steps, one item each."""

    def __init__(self, report: Report, context: Context) -> None:
        self._report = report
        self._case = "SD 1.5, B2, 64x64, float16" if context.cuda else "tiny"
        self.bench = Bench(context.device)
        self.context = context
        self.seconds: dict[str, float] = {}

    def time(self, name: str, make: Callable[[], Callable[[], object]], backend: str = "torch") -> None:
        """Record the time of what ``make`` returns."""
        with self._report.item(name) as item:
            need(backend, self.context.device)
            if "CUDA graph" in name or "compile" in name:
                self.context.need_cuda()
            spread = self.bench.seconds(make(), flush=False, least=_CALLS if self.context.cuda else 3)
            self.seconds[name] = spread.p50
            row = self.bench.row("step", name, self._case, "time", "ms", spread.map(lambda s: 1e3 * s))
            item.values["rows"] = [asdict(row)]


def step(report: Report, context: Context) -> None:
    """Time UNet and ControlNet through diffusers and our torch engines, and the share of the probe head."""
    steps = _Steps(report, context)
    bench, seconds = steps.bench, steps.seconds
    models = make_models(context)
    with torch.no_grad():
        eager = functools.partial(models.diffusers, models.controlnet, models.unet)
        steps.time("diffusers eager", lambda: eager)
        steps.time("diffusers eager, CUDA graph", lambda: bench.graph(eager))
        steps.time("UNet alone, diffusers eager, CUDA graph", lambda: bench.graph(models.unet_alone))
        steps.time("torch engine", lambda: functools.partial(engine_step, *models.engines, models.inputs))
        steps.time(
            "torch engine, CUDA graph",
            lambda: functools.partial(graphed_step, StepGraphs(models.engines[0], models.engines[1]), models.inputs),
        )
        _head_share(report, steps)
    with report.item("goals of the step") as item:
        context.need_cuda()
        whole, alone = seconds["diffusers eager, CUDA graph"], seconds["UNet alone, diffusers eager, CUDA graph"]
        best = min(seconds, key=lambda name: seconds[name] if name.startswith("torch engine") else float("inf"))
        item.values["best"] = best
        item.goals[f"{best}, ms"] = at_most(1e3 * seconds[best], _STEP_MS)
        item.goals["cost factor of the ControlNet"] = at_most(whole / alone, _COST_FACTOR)


def compiled(report: Report, context: Context) -> None:
    """Time the same step through diffusers with torch.compile, and with the weights channels last."""
    steps = _Steps(report, context)
    models = make_models(context)
    models.unet.to(memory_format=torch.channels_last)
    models.controlnet.to(memory_format=torch.channels_last)
    with torch.no_grad():
        eager = functools.partial(models.diffusers, models.controlnet, models.unet)
        steps.time("diffusers eager, channels last, CUDA graph", lambda: steps.bench.graph(eager))
        fast = functools.partial(
            models.diffusers,
            torch.compile(models.controlnet, dynamic=False),
            torch.compile(models.unet, dynamic=False),
        )
        steps.time("diffusers torch.compile, channels last", lambda: fast)
        steps.time("diffusers torch.compile, channels last, CUDA graph", lambda: steps.bench.graph(fast))


def _head_share(report: Report, steps: _Steps) -> None:
    """Time the fused head with the check behind it, as a share of the fastest step so far."""
    with report.item("share of the probe head") as item:
        steps.context.need_cuda()
        bench = steps.bench
        read = measure.head_calls(bench)["fused"]
        spec = SPECS["fidelity_reduce"]
        compare = functools.partial(spec.op, *spec.arguments(_CHECKED, torch.float32, bench.device))

        def both() -> Tensor:
            read()
            return compare()

        head = bench.seconds(bench.graph(both)).p50
        fastest = min(value for name, value in steps.seconds.items() if not name.startswith("UNet alone"))
        item.values |= {"head_us": 1e6 * head, "step_ms": 1e3 * fastest}
        item.goals["probe head and check, share of a step"] = at_most(head / fastest, _HEAD_SHARE)


_PLANS = tuple(name for name, backend in table.BACKENDS.items() if backend.needs_gpu)


def exported(report: Report, context: Context) -> None:
    """Time the same step through ONNX Runtime and TensorRT, where these can use the GPU."""
    steps = _Steps(report, context)
    for backend in ("onnxruntime", *_PLANS):
        for graphed in (False, True) if backend in _PLANS else (False,):
            name = f"{backend}, CUDA graph" if graphed else backend
            steps.time(name, functools.partial(_exported, backend, graphed, context), backend)


def _exported(backend: str, graphed: bool, context: Context) -> Callable[[], object]:
    context.need_cuda()
    controlnet, unet = (_exported_engine(name, backend, context) for name in ("controlnet", "unet"))
    inputs = {
        n: t.to(context.device)
        for n, t in example_inputs(controlnet.inputs, {"samples": 2, "rows": 8, "columns": 8}).items()
    }
    if graphed:
        return functools.partial(graphed_step, StepGraphs(controlnet, unet), inputs)
    return functools.partial(engine_step, controlnet, unet, inputs)


def _exported_engine(name: str, backend: str, context: Context) -> Engine:
    """Return one graph, exported and built at the first call; later calls find the files."""
    graph = sd15_graph(name, torch.float16)
    inputs, outputs = graph.inputs, graph.outputs
    side = SizeRange(512, 512, 512)
    # With guidance: a batch of two, in plans through the profile of one guided picture.
    profile, multiple = Profile(SizeRange(1, 1, 1), side, side), size_multiple(sd15_unet_config(), VAE_CONFIG)
    folder = context.work / "sd15"
    folder.mkdir(exist_ok=True)
    onnx = folder / f"{name}.onnx"
    if not onnx.exists():
        partial = folder / "partial" / onnx.name
        partial.parent.mkdir(exist_ok=True)
        export_graph(graph, partial, profile.symbols(multiple))
        for path in sorted(partial.parent.iterdir(), reverse=True):
            path.replace(folder / path.name)  # the graph itself last: it says that the weights are there
    del graph
    gc.collect()
    if backend not in _PLANS:
        from engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(name, onnx, context.device)
    from engines.tensorrt.engine import TensorRtEngine
    from engines.tensorrt.plan import PlanRequest
    from engines.tensorrt.worker import build

    plan = folder / f"{name}.{backend}.plan"
    if not plan.exists():
        profiles = tuple(optimisation_profiles(describe(inputs), profile, multiple))
        build(PlanRequest(backend, onnx, plan, "fp16", profiles))
    return TensorRtEngine(name, plan, inputs, outputs, flavour=backend, device=context.device)
