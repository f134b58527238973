"""``icexport bench``: how fast a bundle is, beside diffusers."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from icexport.cli.console import Steps, emit, say
from icexport.cli.options import Backends, BundlePath, Device, Json
from icexport.errors import UsageError


def bench(
    bundle: BundlePath,
    backend: Backends = None,
    device: Device = None,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Denoising steps.")] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures in one call.")] = 1,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Rounds that do not count.")] = 1,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Rounds that count.")] = 5,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Launch each step as one CUDA graph.")] = False,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Leave diffusers itself out.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="NAME", help="Write NAME.json, NAME.md and NAME.png, too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a bundle beside diffusers.

    Whole calls from prompt to pictures, in rounds in which every backend takes its turn. The control score and the
    difference to diffusers' pictures stand beside the times.
    """
    if output is not None and find_spec("matplotlib") is None:  # not only when all is measured
        raise UsageError("--output draws a chart, which needs matplotlib: pip install 'icexport[report]'")
    with Steps() as shown:
        from icexport.bench.latency import run_latency

        report = run_latency(
            bundle,
            backends=backend,
            steps=steps,
            warmup=warmup,
            iterations=iterations,
            batch=batch_size,
            device=device,
            cuda_graph=cuda_graph,
            baseline=not no_baseline,
            progress=shown,
        )
    if output is not None:
        say(f"Wrote {', '.join(map(str, report.save(output)))}")
    if as_json:
        emit(asdict(report))
    else:
        typer.echo(report.to_markdown(), nl=False)
