"""Running commands in this process, without leaving their logging behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from icexport.cli.console import OURS
from icexport.cli.main import app

Run = Callable[..., Result]


@pytest.fixture
def icexport() -> Iterator[Run]:
    """``icexport("inspect", path)`` -> result with exit_code, stdout, stderr."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", *OURS)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield lambda *args: CliRunner().invoke(app, list(map(str, args)), prog_name="icexport")
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers
