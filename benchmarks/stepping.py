"""How long mixed requests wait: batching by step, batching by request, and one by one, under the same arrivals.

    icexport build --cond canny
    python -m benchmarks.stepping builds/canny --output DIR

Requests of 4, 10, 20 and 50 steps, of three schedulers, with guidance and without, at three strengths of control come
at random (a Poisson process), at a share of what the machine draws one by one. Each way of serving gets the same
arrivals. By step: every picture joins the step engine when it comes. By request: pictures of equal settings that wait
are drawn together to their end, the longest waiting first. Results are in DIR/stepping.json, stepping.md and
stepping.png.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from icexport import InnerControlPipeline
from icexport.host.files import write_whole
from icexport.host.versions import machine
from icexport.runtime.schedulers import choose_scheduler
from icexport.runtime.slots import StepRequest
from icexport.runtime.step_engine import StepEngine

STEPS = (4, 10, 20, 50)
SCHEDULERS = ("DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete")
_GUIDANCE = (1.0, 7.5)
_STRENGTHS = (0.5, 1.0, 1.5)
_SHARES = (0.5, 0.95, 0.99)


class Kind(NamedTuple):
    """Settings of a request; those that differ in them cannot be batched by request."""

    steps: int
    scheduler: str
    guidance: float
    strength: float


@dataclass(frozen=True)
class Arrival:
    """A request.

    Attributes:
        kind: its settings.
        request: the picture.
        due: when it comes, in seconds from the start.
    """

    kind: Kind
    request: StepRequest
    due: float


@dataclass(frozen=True)
class Served:
    """What became of a way of serving.

    Attributes:
        latencies: seconds from a request's arrival to its latents, in the order of arrival.
        seconds: from the start to the last of them.
        pictures: how many pictures each call had.
    """

    latencies: list[float]
    seconds: float
    pictures: list[int]


Batch = Callable[[Sequence[Arrival]], Sequence[Arrival]]
"""Of the requests that wait while nothing is drawn, those that are drawn next, to their end."""


def by_request(limit: int) -> Batch:
    """Draw requests of the settings of the one that waits longest, up to so many."""
    return lambda waiting: [one for one in waiting if one.kind == waiting[0].kind][:limit]


def one_by_one(waiting: Sequence[Arrival]) -> Sequence[Arrival]:
    """Draw the request that waits longest."""
    return waiting[:1]


def serve(engine: StepEngine, arrivals: Sequence[Arrival], batch: Batch | None = None) -> Served:
    """Serve requests as they arrive.

    Args:
        engine: draws.
        arrivals: the requests, in the order in which they come.
        batch: chooses what is drawn next; None: every request joins as soon as it comes.
    """
    coming, waiting = deque(arrivals), list[Arrival]()
    tickets: dict[Future[Any], Arrival] = {}
    latency: dict[float, float] = {}
    pictures: list[int] = []
    start = time.perf_counter()
    while coming or waiting or tickets:
        now = time.perf_counter() - start
        while coming and coming[0].due <= now:
            waiting.append(coming.popleft())
        joining = waiting if batch is None else batch(waiting) if waiting and not tickets else []
        for arrival in joining:
            tickets[engine.admit(arrival.request)] = arrival
        waiting = [arrival for arrival in waiting if arrival not in joining]
        if not tickets:
            time.sleep(max(0.0, coming[0].due - now))
            continue
        pictures.append(engine.step())
        now = time.perf_counter() - start
        for ticket in [ticket for ticket in tickets if ticket.done()]:
            ticket.result()  # its error, if it has one
            due = tickets.pop(ticket).due
            latency[due] = now - due
    return Served([latency[arrival.due] for arrival in arrivals], time.perf_counter() - start, pictures)


def make_arrivals(pipe: InnerControlPipeline, count: int, share: float, seed: int) -> list[Arrival]:
    """Return requests of random settings that arrive at random.

    Args:
        pipe: makes and draws them.
        count: how many.
        share: of the rate at which they can be drawn one by one.
        seed: decides all of them.
    """
    dice = random.Random(seed)  # noqa: S311  not a secret
    profile, own = pipe.bundle.manifest.profile, pipe.scheduler
    control = torch.rand(1, 3, profile.height.opt, profile.width.opt, generator=torch.Generator().manual_seed(seed))
    made: list[tuple[Kind, StepRequest]] = []
    for number in range(count):
        kind = Kind(dice.choice(STEPS), dice.choice(SCHEDULERS), dice.choice(_GUIDANCE), dice.choice(_STRENGTHS))
        pipe.scheduler = choose_scheduler(kind.scheduler, own)
        (request,) = pipe.step_requests(
            "a red apple",
            control.round(),
            num_inference_steps=kind.steps,
            guidance_scale=kind.guidance,
            controlnet_conditioning_scale=kind.strength,
            generator=torch.Generator().manual_seed(number),
            check_fidelity=False,
        )
        made.append((kind, request))
    pipe.scheduler = own
    cost = _seconds_of_calls(pipe.step_engine, [request for _, request in made])
    gap = statistics.mean(request.coefficients.calls * cost[request.rows] for _, request in made) / share
    arrivals, due = [], 0.0
    for kind, request in made:
        due += dice.expovariate(1 / gap)
        arrivals.append(Arrival(kind, request, due))
    return arrivals


def _seconds_of_calls(engine: StepEngine, requests: Sequence[StepRequest]) -> dict[int, float]:
    """Return how long a call of one picture takes, by its rows."""
    found = {}
    for request in {request.rows: request for request in requests}.values():
        engine.admit(request)
        times = []
        while True:
            started = time.perf_counter()
            if not engine.step():
                break
            times.append(time.perf_counter() - started)
        found[request.rows] = statistics.median(times)
    return found


def summary(arrivals: Sequence[Arrival], served: Mapping[str, Served]) -> dict[str, Any]:
    """Return throughput, pictures per call, and quantiles of the latencies by number of steps, for each way."""
    found: dict[str, Any] = {}
    for name, one in served.items():
        by_steps = {}
        for steps in sorted({arrival.kind.steps for arrival in arrivals}):
            times = sorted(t for a, t in zip(arrivals, one.latencies, strict=True) if a.kind.steps == steps)
            ranks = {f"p{100 * share:.0f}": times[min(len(times) - 1, int(share * len(times)))] for share in _SHARES}
            by_steps[str(steps)] = {"requests": len(times), **{rank: round(t, 4) for rank, t in ranks.items()}}
        found[name] = {
            "pictures per second": round(len(arrivals) / one.seconds, 4),
            "pictures per call": round(statistics.mean(one.pictures), 3),
            "calls": len(one.pictures),
            "seconds": round(one.seconds, 2),
            "latency": by_steps,
        }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        "| way | steps | requests | p50 s | p95 s | p99 s | pictures/s | pictures/call |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        for steps, times in row["latency"].items():
            cells = (times["requests"], *(f"{times[rank]:.2f}" for rank in ("p50", "p95", "p99")))
            rates = (row["pictures per second"], row["pictures per call"])
            lines.append(f"| {' | '.join(map(str, (name, steps, *cells, *rates)))} |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw the 95th percentile of the latency by number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(found)
    for place, (name, row) in enumerate(found.items()):
        values = [times["p95"] for times in row["latency"].values()]
        positions = [index + (place - (len(found) - 1) / 2) * width for index in range(len(values))]
        axes.bar(positions, values, width, label=name)
    labels = [f"{steps} steps" for steps in next(iter(found.values()))["latency"]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="s", yscale="log", title="Latency, 95th percentile")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of ``python -m benchmarks.stepping``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stepping",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--requests", type=int, default=120, help="how many (default 120)")
    parser.add_argument("--share", type=float, default=0.7, help="of what is drawn one by one (default 0.7)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.requests < 1 or args.share <= 0:
        parser.error("--requests must be at least 1, --share above 0")
    pipe = InnerControlPipeline.from_pretrained(args.bundle, backend=args.backend)
    arrivals = make_arrivals(pipe, args.requests, args.share, args.seed)
    limit = pipe.bundle.manifest.profile.batch.max
    ways: dict[str, Batch | None] = {"by step": None, "by request": by_request(limit), "one by one": one_by_one}
    served = {}
    for name, batch in ways.items():
        sys.stderr.write(f"{name}: {len(arrivals)} requests, the last one after {arrivals[-1].due:.0f} s\n")
        served[name] = serve(pipe.step_engine, arrivals, batch)
    found = summary(arrivals, served)
    args.output.mkdir(parents=True, exist_ok=True)
    options = {"requests": args.requests, "share": args.share, "seed": args.seed, "backend": pipe.backend}
    document = {"machine": machine(str(pipe.device)), "options": options, "ways": found}
    write_whole(args.output / "stepping.json", json.dumps(document, indent=2) + "\n")
    write_whole(args.output / "stepping.md", markdown(found))
    plot(found, args.output / "stepping.png")
    sys.stdout.write(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
