"""Errors of the engines. Each message says what happened, what was expected, and what to do."""


class EngineError(Exception):
    """A graph could not be loaded or run."""


class OutOfMemoryError(EngineError):
    """A graph could not be loaded or run because there was not enough memory."""


class BackendUnavailableError(EngineError):
    """A backend, or the device it was asked to use, is not usable on this machine."""


class ShapeError(EngineError, ValueError):
    """Inputs do not fit an engine: a name, dtype, device, rank or size is wrong."""
