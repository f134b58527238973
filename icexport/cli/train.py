"""``icexport train``: train models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from icexport.cli.command import Command
from icexport.cli.console import emit, show, silence_libraries
from icexport.cli.options import CONDITIONS, Json
from icexport.errors import IcexportError, UsageError

app = typer.Typer(name="train", help="Train models.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Train models.

    On several GPUs: accelerate launch -m icexport train COMMAND, with the same options.
    """


@contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:  # some are imported late, by the stage that needs them
        raise IcexportError(f"{error}. Training needs more packages: pip install 'icexport[train]'") from error


@app.command(cls=Command)
def base(
    work: Annotated[
        Path,
        typer.Option("--work", metavar="DIR", file_okay=False, help="Checkpoints; a stopped run goes on from there."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", file_okay=False, help="The model.  [default: WORK/model]")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="TOML", exists=True, dir_okay=False, help="Recipe.  [default: reference.toml]"
        ),
    ] = None,
) -> None:
    """Train the reference model.

    Autoencoder, UNet, text encoder, depth network, and a ControlNet and a probe for each condition, from nothing.
    """
    with _packages():
        silence_libraries()
        from training.reference import stages, tokenizer

        recipe = config or stages.RECIPE
        try:
            stages.stages(recipe)
        except (TypeError, ValueError) as error:  # from TOML, and from the dataclass of a stage
            raise UsageError(f"{recipe} is not a recipe: {error}. Start from {stages.RECIPE}.") from error
        stages.train(work, output or work / "model", recipe, tokenizer.find_bpe_file())


_Cond = Annotated[str | None, typer.Option("--cond", metavar="NAME", help=f"{CONDITIONS}.")]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="reference|DIR|HUB_ID", help="Base model, which stays as it is.  [default: reference]"
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR|NAME|SHARDS",
        help="Pictures and captions: a folder with metadata.jsonl, a Hub data set, or WebDataset shards.",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="DIR", file_okay=False, help="Result, checkpoints and log.  [default: runs/COMMAND-COND]"
    ),
]
_Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Updates in all.")]
_BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Pictures in each process and micro step.")
]
_Rate = Annotated[float | None, typer.Option("--learning-rate", metavar="X", help="AdamW's.")]
_Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="TOML", exists=True, dir_okay=False, help="Settings; options count more."),
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting, as in the file. Repeatable."),
]
_NoResume = Annotated[
    bool, typer.Option("--no-resume", help="Refuse an output folder that has checkpoints, instead of going on.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Check models, data and settings, and stop.")]


@app.command(cls=Command)
def probe(
    cond: _Cond = None,
    model: _Model = None,
    controlnet: Annotated[
        str | None,
        typer.Option(
            "--controlnet",
            metavar="DIR|HUB_ID|none",
            help="Runs in half of the batches.  [default: controlnet-COND in the model's folder, if any]",
        ),
    ] = None,
    probe: Annotated[
        str | None, typer.Option("--probe", metavar="DIR|HUB_ID", help="Where to start.  [default: a new probe]")
    ] = None,
    taps: Annotated[
        Literal["attn", "conv"] | None, typer.Option("--taps", help="What a new probe reads.  [default: attn]")
    ] = None,
    data: _Data = None,
    output: _Output = None,
    steps: _Steps = None,
    batch_size: _BatchSize = None,
    learning_rate: _Rate = None,
    config: _Config = None,
    assignments: _Set = None,
    no_resume: _NoResume = False,
    dry_run: _DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a probe: the network that reads the control map back from the UNet.

    Ends with the leak test: whether it reads the picture, or the control that the ControlNet put into the features.
    """
    options: dict[str, dict[str, Any]] = {
        "model": {"cond": cond, "base": model, "controlnet": controlnet, "probe": probe},
        "probe": {"taps": taps},
        "data": {"source": data},
        "training": {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate},
    }
    with _packages():
        silence_libraries()
        from training.config import probe_run
        from training.run import train_probe

        run = probe_run(config, _given(options, assignments))
        folder = output or Path("runs", f"probe-{run.model.cond}")
        _report(train_probe(run, folder, resume=not no_resume, dry_run=dry_run), as_json)


@app.command(cls=Command)
def controlnet(
    cond: _Cond = None,
    model: _Model = None,
    controlnet: Annotated[
        str | None,
        typer.Option(
            "--controlnet",
            metavar="DIR|HUB_ID|scratch",
            help="Where to start.  [default: controlnet-COND in the model's folder, else the preset's]",
        ),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            "--probe", metavar="DIR|HUB_ID", help="Of the alignment loss.  [default: probe-COND in the model's folder]"
        ),
    ] = None,
    preset: Annotated[
        Literal["innercontrol", "controlnet++", "finetune"] | None,
        typer.Option("--preset", help="Losses and their published values.  [default: innercontrol]"),
    ] = None,
    data: _Data = None,
    output: _Output = None,
    steps: _Steps = None,
    batch_size: _BatchSize = None,
    learning_rate: _Rate = None,
    config: _Config = None,
    assignments: _Set = None,
    no_resume: _NoResume = False,
    dry_run: _DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a ControlNet on diffusion, reward and alignment losses.

    Only the ControlNet changes. The result is an ordinary diffusers folder.
    """
    options: dict[str, dict[str, Any]] = {
        "model": {"cond": cond, "base": model, "controlnet": controlnet, "probe": probe},
        "loss": {"preset": preset},
        "data": {"source": data},
        "training": {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate},
    }
    with _packages():
        silence_libraries()
        from training.config import controlnet_run
        from training.run import train_controlnet

        run = controlnet_run(config, _given(options, assignments))
        folder = output or Path("runs", f"controlnet-{run.model.cond}")
        _report(train_controlnet(run, folder, resume=not no_resume, dry_run=dry_run), as_json)


def _given(options: Mapping[str, Mapping[str, Any]], texts: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return the options that were given, and on top of them what ``--set`` says."""
    from training.config import assignments, merge

    given = {name: {k: v for k, v in table.items() if v is not None} for name, table in options.items()}
    return merge({name: table for name, table in given.items() if table}, assignments(texts or []))


def _report(document: dict[str, Any] | None, as_json: bool) -> None:
    """Print the result; None comes from all processes but the first."""
    if document is not None:
        (emit if as_json else show)(document)
