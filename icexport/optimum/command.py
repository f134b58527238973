"""The hook into ``optimum-cli``: its ``export onnx`` command learns ``--model-kwargs '{"condition": ...}'``."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from icexport.errors import IcexportError, UsageError

_NAMES = ("condition", "controlnet", "probe")
_EXAMPLE = """--model-kwargs '{"condition": "canny", "controlnet": "FOLDER_OR_HUB_ID", "probe": "none"}'"""
_NEXT = """To draw with it, in Python:
    from icexport.optimum.pipeline import ORTStableDiffusionControlNetPipeline
    pipe = ORTStableDiffusionControlNetPipeline.from_pretrained({folder!r})"""
_FILE_NAME = "register_icexport.py"
# optimum-cli imports this at every start, also after icexport is gone.
_FILE_TEXT = '''"""Written by `python -m icexport.optimum register`; `unregister` in its place removes it."""

from importlib.util import find_spec

if find_spec("icexport"):
    from icexport.optimum.command import extend_export

    extend_export()
'''


def extend_export() -> None:
    """Teach the ``export onnx`` command of this process about ControlNets; loads no torch until it is used."""
    from optimum.commands.export.onnx import ONNXExportCommand

    plain = ONNXExportCommand.run

    def run(self: Any) -> None:
        kwargs = self.args.model_kwargs or {}
        try:
            control = _control(kwargs)
            if not control:
                plain(self)
                return
            from icexport.optimum.export import controlled

            self.args.model_kwargs = None
            with controlled(model=self.args.model, **control):
                plain(self)
            print(_NEXT.format(folder=self.args.output))  # noqa: T201 - a command's own output
        except IcexportError as error:
            hint = f" In optimum-cli, these options go into {_EXAMPLE}." if isinstance(error, UsageError) else ""
            raise SystemExit(f"Error: {error}{hint}") from error

    ONNXExportCommand.run = run


def _control(kwargs: dict[str, Any]) -> dict[str, str]:
    """Return the options of a ControlNet export; none: it is another kind of export.

    Raises:
        UsageError: a name or a value is wrong, or only looks like one of ours.
    """
    wrong = sorted(kwargs.keys() - set(_NAMES))
    if len(wrong) == len(kwargs) and not any(get_close_matches(name, _NAMES) for name in wrong):
        return {}
    if wrong:
        raise UsageError(f"A ControlNet export knows {', '.join(_NAMES)}, but not {', '.join(wrong)}.")
    if "condition" not in kwargs or not all(isinstance(value, str) for value in kwargs.values()):
        raise UsageError(f"A ControlNet export needs a condition, and texts as values; got {kwargs}.")
    return kwargs


def register() -> Path:
    """Switch the extension on for every ``optimum-cli`` of this Python environment.

    Returns:
        The file that was written.

    Raises:
        UsageError: optimum-onnx is not installed here, or its folder cannot be written.
    """
    path = _register_folder() / _FILE_NAME
    try:
        path.write_text(_FILE_TEXT, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}. Install in an environment that you own.") from error
    return path


def unregister() -> Path:
    """Undo ``register``; nothing happens if it was never called.

    Returns:
        The file that is gone.

    Raises:
        UsageError: see ``register``.
    """
    path = _register_folder() / _FILE_NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot remove {path}: {error.strerror}.") from error
    return path


def _register_folder() -> Path:
    """Return optimum-onnx's own folder of command files."""
    try:
        spec = find_spec("optimum.commands.register")
    except ModuleNotFoundError:
        spec = None
    for folder in map(Path, spec.submodule_search_locations or ()) if spec else ():
        if (folder / "register_export.py").is_file():
            return folder
    raise UsageError(
        "optimum-onnx is not installed here. Install it in an environment of its own: pip install 'icexport[optimum]'."
    )
