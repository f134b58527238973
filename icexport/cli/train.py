"""``icexport train``: train models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icexport.cli.command import Command
from icexport.errors import IcexportError, UsageError

app = typer.Typer(name="train", help="Train models.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Train models."""


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

    Autoencoder, UNet, text encoder, canny ControlNet and probe, from nothing.
    """
    try:
        from training import reference, tokenizer

        recipe = config or reference.RECIPE
        try:
            reference.stages(recipe)
        except (TypeError, ValueError) as error:  # from TOML, and from the dataclass of a stage
            raise UsageError(f"{recipe} is not a recipe: {error}. Start from {reference.RECIPE}.") from error
        reference.train(work, output or work / "model", recipe, tokenizer.find_bpe_file())
    except ImportError as error:  # some are imported late, by the stage that needs them
        raise IcexportError(f"{error}. Training needs more packages: pip install 'icexport[train]'") from error
