"""What every command shares: logging, and errors that become one clear paragraph and an exit code."""

from __future__ import annotations

import errno
import traceback
from typing import Any

import typer
from typer.core import TyperCommand

from engines.errors import BackendUnavailableError, EngineError, ShapeError
from icexport.cli.console import configure, say
from icexport.cli.theirs import explain
from icexport.errors import FidelityError, IcexportError, ParityError, UnsupportedOptionError, UsageError

FAILED, USAGE, CHECK_FAILED, UNAVAILABLE, BUG, INTERRUPTED = 1, 2, 3, 4, 70, 130
_CODES: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits counts
    (KeyboardInterrupt, INTERRUPTED),
    (BackendUnavailableError, UNAVAILABLE),
    (ParityError, CHECK_FAILED),
    (FidelityError, CHECK_FAILED),
    (UsageError, USAGE),
    (UnsupportedOptionError, USAGE),
    (ShapeError, USAGE),
    (IcexportError, FAILED),
    (EngineError, FAILED),
    (OSError, FAILED),
    (MemoryError, FAILED),
)
_SEVERAL = "--target-sm"
_LESS_MEMORY = {
    "build": "Build for a smaller --height, --width or --batch-size, or with --no-verify",
    "generate": "Use --low-memory, a smaller --height and --width, or fewer --num-images",
}
"""What a command offers to someone whose machine is too small."""


def exit_code(error: BaseException) -> int:
    """Return the exit code that says what kind of failure ``error`` is."""
    if _is_out_of_memory(error):
        return FAILED
    known = next((code for kind, code in _CODES if isinstance(error, kind)), BUG)
    return FAILED if known == BUG and explain(error) else known


class Command(TyperCommand):
    """A command that takes -v and -q after its name, too, and reports errors."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's own parameters, and those of the program that may follow its name."""
        shared = [p for p in ctx.find_root().command.params if p.name in ("verbose", "quiet")]
        return [*super().get_params(ctx), *shared]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; ``--target-sm 86 89`` is taken for ``--target-sm 86 --target-sm 89``."""
        return super().parse_args(ctx, _spread(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: raised with the exit code, after any error.
        """
        before, after = ctx.find_root().params, {name: ctx.params.pop(name) for name in ("verbose", "quiet")}
        verbosity = before["verbose"] + after["verbose"]
        try:
            configure(-1 if before["quiet"] or after["quiet"] else verbosity)
            if self.name != "doctor":  # which reports it as a finding
                from icexport.host.preflight import check_torchvision

                check_torchvision()
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = exit_code(error)
            if verbosity > (0 if code == BUG else 1):
                say("".join(traceback.format_exception(error)).rstrip())
            say(_message(error, code, self.name))
            raise typer.Exit(code) from error


def _spread(args: list[str]) -> list[str]:
    """Repeat an option that takes several numbers before each of them, which is what click understands."""
    spread: list[str] = []
    several = False
    for arg in args:
        following = several and arg.isdecimal() and spread[-1] != _SEVERAL
        spread += [_SEVERAL, arg] if following else [arg]
        several = arg == _SEVERAL or (several and arg.isdecimal())
    return spread


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # One of these is torch's, which is not to be imported for this; a CPU's has no class of its own.
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)


def _message(error: BaseException, code: int, command: str | None) -> str:
    text = str(error) or type(error).__name__
    if code == INTERRUPTED:
        return "Interrupted. Nothing half-written is left; what was there before is untouched."
    if code == BUG:
        kind = type(error).__name__
        return f"A bug of icexport: {kind}: {text}\nPlease report it, with what -v adds and what icexport doctor says."
    if _is_out_of_memory(error):
        advice = _LESS_MEMORY.get(command or "", "Use smaller sizes")
        return f"Error: Out of memory. Nothing half-written is left. {advice}, or free some memory. ({text})"
    if not isinstance(error, IcexportError | EngineError) and (meaning := explain(error)):
        return f"Error: {meaning}"
    return f"Error: {text}"
