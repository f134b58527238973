"""Conditions: what a control map shows, how it is read from a picture, and how well a picture follows one."""

from __future__ import annotations

from icexport.conditions.base import Condition
from icexport.conditions.canny import Canny
from icexport.conditions.depth import REFERENCE, Depth
from icexport.conditions.hed import Hed
from icexport.conditions.lineart import Lineart
from icexport.errors import ConditionError

__all__ = ["Canny", "Condition", "Depth", "Hed", "Lineart", "get", "names", "of_model"]

_CONDITIONS: dict[str, type[Condition]] = {kind.name: kind for kind in (Canny, Hed, Lineart, Depth)}


def names() -> tuple[str, ...]:
    """The names that `get` and ``--cond`` take."""
    return tuple(_CONDITIONS)


def get(name: str, **options: object) -> Condition:
    """The condition called ``name``, with its options set.

    Args:
        name: One of `names`.
        **options: Fields of its class, for instance ``low_threshold=100`` for canny.

    Raises:
        ConditionError: If the name or an option is unknown, or an option is out of range.
    """
    if name not in _CONDITIONS:
        raise ConditionError(f"There is no condition {name!r}. Known conditions: {', '.join(names())}.")
    return _CONDITIONS[name]().with_options(**options)


def of_model(name: str, model: str, **options: object) -> Condition:
    """The condition called ``name`` as it is used with ``model``: the reference model has a depth network of its own.

    Args:
        name: One of `names`.
        model: The base model as a user names it: ``reference``, a folder or a hub id.
        **options: As `get`; they win.

    Raises:
        ConditionError: As `get`.
    """
    if name == Depth.name and model == REFERENCE:
        options = {"model": REFERENCE, **options}
    return get(name, **options)
