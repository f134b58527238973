"""``icexport``: the commands, and the options that all of them share."""

from __future__ import annotations

from typing import Annotated

import typer

from icexport.cli import bench, build, check, convert, evaluate, gc, generate, inspect, train
from icexport.cli.command import Command

app = typer.Typer(
    name="icexport",
    help="From an InnerControl checkpoint to fast engines that are checked to obey the control.",
    epilog="Exit codes: 0 ok; 1 failed; 2 usage; 3 parity or fidelity failed; 4 backend or device unavailable; "
    "70 a bug of icexport; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes a quarter of the time that --help may take
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for function in (
    build.build,
    build.export,
    generate.generate,
    check.verify,
    inspect.inspect,
    bench.bench,
    check.doctor,
    evaluate.evaluate,
    convert.convert,
    gc.gc,
):
    app.command(cls=Command)(function)
app.add_typer(train.app)


def _version(wanted: bool) -> None:
    if wanted:
        from icexport import __version__

        typer.echo(f"icexport {__version__}")
        raise typer.Exit


@app.callback()
def shared(
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, help="-v: more log; -vv: all, and tracebacks."
        ),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only, no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """``icexport.cli.command`` reads the first two; they may stand before or after the command's name."""


def main() -> None:
    """Run the command line; ends the process with one of the exit codes of ``icexport.cli.command``."""
    app(prog_name="icexport")
