"""``icexport generate``: pictures from a bundle, a prompt and a control map."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from icexport.cli.console import Steps, emit, table
from icexport.cli.options import Backend, BundlePath, Device, Json, Preflight
from icexport.errors import FidelityError, UsageError

if TYPE_CHECKING:
    from icexport.bundle.store import Bundle
    from icexport.fidelity.report import FidelityReport
    from icexport.progress import Progress
    from icexport.runtime.pipeline import InnerControlPipeline

_MAX_SEED = 2**63 - 1
_MAX_PICTURES = 10_000

_Picture = Annotated[
    Path | None,
    typer.Option(
        "--image", metavar="FILE", exists=True, dir_okay=False, help="Picture to extract the control map from."
    ),
]
_ControlMap = Annotated[
    Path | None,
    typer.Option("--control-map", metavar="FILE", exists=True, dir_okay=False, help="A ready control map instead."),
]
_Threshold = "Canny: {} gradient of an edge, 0 to 1530; with --image only.  [default: {}]"
_Png = typer.Option("--output", metavar="FILE.png", dir_okay=False, help="Several pictures: -0, -1 ... before .png.")


def generate(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to draw.", show_default=False)],
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What to avoid.")
    ] = None,
    image: _Picture = None,
    control_map: _ControlMap = None,
    fit: Annotated[
        Literal["crop", "pad", "stretch"], typer.Option("--fit", help="How the file is brought to the picture's size.")
    ] = "crop",
    low_threshold: Annotated[
        float | None, typer.Option("--low-threshold", help=_Threshold.format("weakest", 60))
    ] = None,
    high_threshold: Annotated[
        float | None, typer.Option("--high-threshold", help=_Threshold.format("surely strong enough", 140))
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Denoising steps.")] = 20,
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", help="Weight of the prompt; 1: no guidance.")
    ] = 7.5,
    controlnet_scale: Annotated[
        float, typer.Option("--controlnet-scale", help="Weight of the control; 0: off.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=_MAX_SEED, help="Of the first picture; the next one has the next seed.")
    ] = 0,
    num_images: Annotated[int, typer.Option("--num-images", min=1, max=_MAX_PICTURES, help="Number of pictures.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="NAME", help="As in diffusers: DDIM, ...  [default: the bundle's]"),
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", min=1, help="Pixels.  [default: the bundle's usual size]")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="As --height.")] = None,
    backend: Backend = "auto",
    device: Device = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory/--no-low-memory",
            help="Open each part of the model only while it is needed. Slower.  [default: if memory is short]",
            show_default=False,
        ),
    ] = None,
    preflight: Preflight = True,
    output: Annotated[Path, _Png] = Path("out.png"),
    save_control_map: Annotated[
        Path | None,
        typer.Option(
            "--save-control-map", metavar="FILE.png", dir_okay=False, help="Write the control map used, too."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from a prompt and a control map.

    Tells how well they follow it, too: the score of each, and what the probe read at the first and the last step.
    """
    from icexport.bundle.store import Bundle

    source = image or control_map
    if source is None or (image and control_map):
        raise UsageError("Give either --image (a picture to extract from) or --control-map (a ready map).")
    paths = numbered(output, num_images)
    for path in (save_control_map, output):
        if path is not None and path.suffix.lower() != ".png":
            raise UsageError(f"{path}: pictures are written as PNG, which holds the settings, too. Name a .png file.")
    opened = Bundle(bundle)
    height, width = _size(opened, height, width)
    with Steps() as shown:
        shown.expect(3)
        shown("load the bundle")  # silences libraries: before the next imports, which warn
        from icexport.conditions.maps import extracted_map, ready_map
        from icexport.host.pictures import save_png, to_image
        from icexport.host.pixels import to_pixels
        from icexport.runtime.drawing import Request, draw_calls, joined, split_calls

        given = {"low_threshold": low_threshold, "high_threshold": high_threshold}
        thresholds = {name: value for name, value in given.items() if value is not None}
        control = (
            ready_map(source, (width, height), fit, thresholds)
            if image is None
            else extracted_map(opened.condition(**thresholds), image, (width, height), fit)
        )
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        condition = opened.manifest.condition.name
        if save_control_map is not None:
            save_control_map.parent.mkdir(parents=True, exist_ok=True)
            save_png(control, save_control_map, {"condition": condition})

        pipe = _load(opened, scheduler, backend=backend, device=device, low_memory=low_memory, preflight=preflight)
        pipe.condition = pipe.condition.with_options(**thresholds)  # the score reads pictures as the map was read
        request = Request(
            prompt,
            range(seed, seed + num_images),
            negative_prompt=negative_prompt or "",
            steps=steps,
            guidance_scale=guidance_scale,
            controlnet_scale=controlnet_scale,
        )
        settings = {
            "prompt": prompt,
            "negative_prompt": request.negative_prompt,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "controlnet_scale": controlnet_scale,
            "scheduler": type(pipe.scheduler).__name__,
            "height": height,
            "width": width,
            "backend": pipe.backend,
            "condition": condition,
            "bundle_key": opened.manifest.key,
        }
        rows: list[dict[str, Any]] = []
        reports: list[FidelityReport] = []
        calls = opened.manifest.profile.batch
        shown("draw")
        ended = _counting(shown, len(list(split_calls(num_images, calls))))
        drawing = draw_calls(pipe, to_pixels(control), request, calls=calls, check_fidelity=True, callback=ended)
        for drawn in drawing:
            reports.append(part := drawn.checked)
            for i, picture in enumerate(drawn.pictures):  # written at once: what is drawn is not lost
                path = paths[len(rows)]
                errors = [step.errors[i] for step in part.steps]
                found = {"seed": seed + len(rows), "score": (part.scores or [])[i], "probe_errors": errors}
                save_png(to_image(picture), path, {**settings, **found, "metric": part.metric, "unit": part.unit})
                rows.append({"picture": str(path), **found})
        report = joined(reports)
    if as_json:
        emit({"bundle": str(bundle), "settings": settings, "pictures": rows, "fidelity": report.to_json()})
    else:
        _print(rows, report)
    if not report:
        raise FidelityError("The pictures or the probe's readings hold NaN or infinite values: do not use them.")


def _load(bundle: Bundle, scheduler: str | None, **options: Any) -> InnerControlPipeline:
    """Return the pipeline with the bundle's or a named scheduler."""
    from icexport.runtime.pipeline import InnerControlPipeline
    from icexport.runtime.schedulers import choose_scheduler

    pipe = InnerControlPipeline.from_pretrained(bundle, **options)
    if scheduler is not None:
        pipe.scheduler = choose_scheduler(scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _counting(shown: Progress, calls: int) -> Callable[..., dict[str, Any]]:
    """Return a callback that tells after every denoising step how many of all calls' are done."""
    done = itertools.count(1)

    def ended(pipe: InnerControlPipeline, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        number, total = next(done), calls * pipe.num_timesteps  # which may be more than were asked for
        shown("draw", number, total)
        if number == total:
            shown("decode and score")
        return tensors

    return ended


def numbered(path: Path, count: int) -> list[Path]:
    """Return ``path`` itself for one picture, else ``-0``, ``-1`` ... before its suffix."""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def _size(bundle: Bundle, height: int | None, width: int | None) -> tuple[int, int]:
    """Check both sizes in pixels before a picture is scaled to them; that they fit the model is checked later."""
    profile = bundle.manifest.profile
    wanted = {"height": height or profile.height.opt, "width": width or profile.width.opt}
    wrong = [
        f"--{axis} {value}: {bundle.path} takes {getattr(profile, axis)}"
        for axis, value in wanted.items()
        if value not in getattr(profile, axis)
    ]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}. For other sizes, build with --height and --width MIN:OPT:MAX.")
    profile.check_shape(**wanted)
    return wanted["height"], wanted["width"]


def _print(rows: list[dict[str, Any]], report: FidelityReport) -> None:
    score = f"{report.metric} ({'higher' if report.higher_is_better else 'lower'} is better)"
    lines = []
    for row in rows:
        errors = row["probe_errors"]
        reading = f"{errors[0]:.4f} -> {errors[-1]:.4f}" if errors else "no probe"
        lines.append((row["picture"], str(row["seed"]), f"{row['score']:.4f}", reading))
    table(("picture", "seed", score, "probe error"), lines)
