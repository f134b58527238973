"""``python -m icexport.optimum register|unregister``."""

from __future__ import annotations

import typer

from icexport.errors import IcexportError
from icexport.optimum import command

app = typer.Typer(help="ControlNet export for optimum-cli.", no_args_is_help=True)


@app.command()
def register() -> None:
    """Switch ControlNet export on in this environment's optimum-cli."""
    typer.echo(f"optimum-cli export onnx now takes --model-kwargs '{{\"condition\": ...}}': {command.register()}")


@app.command()
def unregister() -> None:
    """Switch it off again."""
    typer.echo(f"Removed {command.unregister()}")


if __name__ == "__main__":
    try:
        app()
    except IcexportError as error:
        raise SystemExit(f"Error: {error}") from error
