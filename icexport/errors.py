"""Every error that icexport raises on purpose. ``icexport.cli`` maps them to exit codes."""

from __future__ import annotations

from typing import Any


class IcexportError(Exception):
    """Base of all errors of icexport.

    The message is one paragraph: what failed, what was found, what was expected, and how to fix it.
    """


class UsageError(IcexportError, ValueError):
    """An argument that cannot be used."""


class ConditionError(UsageError):
    """An unknown condition, an option or picture that it cannot take, or weights that it lacks."""


class UnsupportedOptionError(IcexportError, ValueError):
    """An option that is valid elsewhere but not with this model or engine."""


class CheckpointError(IcexportError):
    """Model weights that are missing, damaged or of another layout."""


class ExportError(IcexportError):
    """A graph that could not be exported."""


class BundleError(IcexportError):
    """A bundle that cannot be read or written."""


class SchemaError(BundleError):
    """A manifest of a newer schema version, or one that breaks the schema."""


class DamagedBundleError(BundleError):
    """A bundle whose files are missing or do not match their hashes."""


class ParityError(IcexportError):
    """An engine whose outputs differ from the PyTorch reference.

    Attributes:
        results: what was measured, by backend, graph and output.
    """

    def __init__(self, message: str, results: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.results = results or {}


class FidelityError(IcexportError):
    """Pictures that do not follow their control map."""
