"""Phases of the GPU suite about the embedded reference model: engines, CUDA graphs, latency."""

from __future__ import annotations

import functools
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

import icexport
from benchmarks.gpu import head
from benchmarks.gpu.machine import ROOT, sources_hash
from benchmarks.gpu.measure import at_least, at_most
from benchmarks.gpu.report import Context, NotAvailable, Report
from engines.capture import CapturedCall
from icexport import conditions
from icexport.backends import table
from icexport.backends.engines import load_engine
from icexport.bench.latency import run_latency
from icexport.bundle.store import Bundle
from icexport.errors import ParityError
from icexport.fidelity.metrics import psnr
from icexport.graphs.graph import example_inputs
from icexport.graphs.profile import SizeRange
from icexport.host.pictures import to_rgb
from icexport.host.pixels import to_pixels
from icexport.models.fused_probe import FusedProbe
from icexport.models.sizes import size_multiple
from icexport.runtime.drawing import Request, draw
from icexport.runtime.pipeline import InnerControlPipeline
from icexport.runtime.step import Deferred, StepGraphs

BACKENDS = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
_CAPTURABLE = ("torch", "tensorrt", "tensorrt-rtx")
_PROMPT = "a red apple"
_CONTROL = ROOT / "docs" / "images" / "apple.png"
_REPLAYS = 10
# So many, because one edge pixel more or less is a percent of a single picture's score.
_PICTURES, _FEW_PICTURES, _STEPS = 16, 2, 20
_MIN_PSNR_DB, _MAX_SCORE_CHANGE = 30.0, 0.01


def need(backend: str, device: str) -> None:
    """Go on only if a backend can run on a device.

    Raises:
        NotAvailable: if it cannot; with the reason, and what to do.
    """
    state = table.get(backend).check()
    if device not in state.devices:
        raise NotAvailable(f"{backend} on {device}: {state.reason}. {state.fix}")


def bundle_of(backend: str, context: Context) -> Bundle:
    """Return the reference model's float16 bundle for a backend; built at the first call, found again later."""
    backends = [backend] if table.get(backend).needs_gpu else ["torch", "onnxruntime"]
    # A bundle's key does not know this code; results of changed code need a bundle that it built.
    folder, store = context.work / "-".join([*backends, sources_hash()]), context.work / "store"
    return icexport.build("canny", backend=backends, dtype="fp16", output=folder, engine_store=store, verify=False)


def engines(report: Report, context: Context) -> None:
    """Check builds, parity of every graph on the device, and pictures in float16 beside those in float32."""
    expected: list[tuple[Tensor, Tensor]] = []
    count = _PICTURES if context.cuda else _FEW_PICTURES
    with report.item("pictures, diffusers float32") as item, _exact():
        expected.append(_draw(_diffusers(context.device), count))
        item.values["scores"] = expected[0][1].tolist()
    for backend in BACKENDS:
        with report.item(f"build, {backend}") as item:
            need(backend, context.device)
            started = time.perf_counter()
            bundle = bundle_of(backend, context)
            found = [entry for entry in bundle.manifest.engines.values() if entry.backend == backend]
            item.values |= {
                "seconds": round(time.perf_counter() - started, 1),
                "engines": {entry.graph: entry.report for entry in found},
                "islands": {name: graph.islands for name, graph in bundle.manifest.graphs.items() if graph.islands},
            }
        with report.item(f"parity, {backend}") as item:
            need(backend, context.device)
            with _exact():
                item.values |= (results := _parity(bundle_of(backend, context), backend, context.device))
            bad = [
                f"{graph}.{name}"
                for graph, outputs in results.items()
                for name, o in outputs.items()
                if not o["passed"]
            ]
            if bad:
                raise ParityError(f"{backend} on {context.device}: {', '.join(bad)} differ too much", results)
        with report.item(f"pictures, {backend}") as item:
            need(backend, context.device)
            pictures, scores = _draw(_pipeline(backend, context), count)
            likeness = psnr(pictures, expected[0][0])
            change = float((scores.mean() / expected[0][1].mean() - 1).abs())
            item.values |= {"psnr_db": likeness.tolist(), "scores": scores.tolist()}
            item.goals["pictures against float32, dB"] = at_least(float(likeness.min()), _MIN_PSNR_DB)
            item.goals["change of the control score"] = at_most(change, _MAX_SCORE_CHANGE)
            missed = [name for name, goal in item.goals.items() if not goal["met"]]
            if missed:
                raise ParityError(f"{backend} on {context.device}: {', '.join(missed)}")


def _exact() -> AbstractContextManager[None]:
    """Keep float32 what it is: cuDNN may use TF32 otherwise."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _parity(bundle: Bundle, backend: str, device: str) -> dict[str, Any]:
    """Return what ``icexport verify`` finds, passed or not: by graph and output."""
    try:
        results = icexport.verify(bundle, backend=backend, device=device)
    except ParityError as error:
        results = error.results
    found: dict[str, Any] = results[backend]
    return found


def _diffusers(device: str) -> Any:
    """Return diffusers' own pipeline on the reference model in float32."""
    folder = icexport.reference_path()
    return StableDiffusionControlNetPipeline.from_pretrained(
        folder,
        controlnet=ControlNetModel.from_pretrained(folder / "controlnet-canny", torch_dtype=torch.float32),
        torch_dtype=torch.float32,
        safety_checker=None,
    ).to(device)


def _pipeline(backend: str, context: Context, cuda_graph: bool = False) -> Any:
    bundle = bundle_of(backend, context)
    return InnerControlPipeline.from_pretrained(bundle, backend=backend, device=context.device, cuda_graph=cuda_graph)


def _draw(pipe: Any, pictures: int) -> tuple[Tensor, Tensor]:
    """Return pictures ``[N,3,H,W]`` of so many seeds, one a call, and their control scores ``[N]``."""
    pipe.set_progress_bar_config(disable=True)
    condition = conditions.get("canny")
    with Image.open(_CONTROL) as picture:
        control = condition.extract(picture.resize((64, 64)))
    maps = to_pixels(to_rgb(control))
    found = draw(pipe, maps, Request(_PROMPT, range(pictures), steps=_STEPS), calls=SizeRange(1, 1, 1)).pictures
    return found, condition.score(found, maps.expand_as(found))


def latency(report: Report, context: Context) -> None:
    """Time whole calls beside eager diffusers, with and without CUDA graphs."""
    counts: dict[str, Any] = {"steps": 20, "iterations": 5} if context.cuda else {"steps": 2, "iterations": 1}
    for backend in BACKENDS:
        for cuda_graph in (False, True) if backend in _CAPTURABLE else (False,):
            with report.item(f"{backend}{', CUDA graph' if cuda_graph else ''}") as item:
                need(backend, context.device)
                if cuda_graph:
                    context.need_cuda()
                bundle = bundle_of(backend, context)
                run = functools.partial(run_latency, bundle, backends=[backend], cuda_graph=cuda_graph, warmup=1)
                item.values |= asdict(run(device=context.device, **counts))


def graphs(report: Report, context: Context) -> None:
    """Check replays of CUDA graphs: always the same bits, and the pictures of runs without graphs."""
    for backend in _CAPTURABLE:
        with report.item(f"replays of a step, {backend}") as item:
            context.need_cuda()
            need(backend, context.device)
            item.values |= _replay_step(bundle_of(backend, context), backend, context.device)
        with report.item(f"pictures, {backend}") as item:
            context.need_cuda()
            need(backend, context.device)
            plain, graphed = (_draw(_pipeline(backend, context, graph), _FEW_PICTURES)[0] for graph in (False, True))
            item.values |= {"largest_difference": float((plain - graphed).abs().max())}
            if not torch.equal((255 * plain).round(), (255 * graphed).round()):
                raise ValueError(f"other pictures with a CUDA graph, by up to {item.values['largest_difference']:.2g}")
    with report.item("replays of the fused head") as item:
        context.need_cuda()
        item.values |= _replay_head(context.device)


def _replay_step(bundle: Bundle, backend: str, device: str) -> dict[str, Any]:
    scratch = table.get(backend).scratch(device)
    controlnet, unet = (load_engine(bundle, name, backend, device, scratch) for name in ("controlnet", "unet"))
    profile, multiple = (
        bundle.manifest.profile,
        size_multiple(bundle.manifest.configs["unet"], bundle.manifest.configs["vae"]),
    )
    symbols = {name: size.opt for name, size in profile.symbols(multiple).items()}
    inputs = [{n: t.to(device) for n, t in example_inputs(e.inputs, symbols).items()} for e in (controlnet, unet)]
    step = StepGraphs(controlnet, unet)
    first_half = {name: tensor for name, tensor in inputs[1].items() if "residual" not in name}

    def replay() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in step(first_half, Deferred(inputs[0]), None).items()}

    plain = unet({**first_half, **controlnet(inputs[0])})
    return _same_bits(plain, [replay() for _ in range(_REPLAYS)])


def _replay_head(device: str) -> dict[str, Any]:
    probe = FusedProbe(head.probe(device, torch.float16))
    taps, embedding = head.inputs(device, torch.float16)
    named = {"time_embedding": embedding, **{f"tap_{i}": tap for i, tap in enumerate(taps)}}

    @torch.no_grad()
    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"reading": probe([tensors[f"tap_{i}"] for i in range(len(taps))], tensors["time_embedding"])}

    call = CapturedCall(run)
    plain = run(named)
    return _same_bits(plain, [{name: t.clone() for name, t in call(named).items()} for _ in range(_REPLAYS)])


def _same_bits(plain: dict[str, Tensor], replays: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return what a report says of replays.

    Raises:
        ValueError: if two replays differ.
    """
    first = replays[0]
    differ = {name for other in replays[1:] for name in first if not torch.equal(first[name], other[name])}
    if differ:
        raise ValueError(f"{len(replays)} replays with the same inputs differ in {', '.join(sorted(differ))}")
    largest = max(float((first[name].float() - plain[name].float()).abs().max()) for name in first)
    return {"replays": len(replays), "largest_difference_to_no_graph": largest}
