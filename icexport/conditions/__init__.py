"""Conditions: what a control map shows, how it is read from a picture, and how well a picture follows one.

The names can be had without torch; the classes are imported when one is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from icexport.errors import ConditionError

if TYPE_CHECKING:
    from icexport.conditions.base import Condition
    from icexport.conditions.canny import Canny
    from icexport.conditions.depth import Depth
    from icexport.conditions.hed import Hed
    from icexport.conditions.lineart import Lineart

__all__ = ["Canny", "Condition", "Depth", "Hed", "Lineart", "get", "names", "of_model", "register"]

_CONDITIONS: dict[str, str | type[Condition]] = {
    "canny": "icexport.conditions.canny:Canny",
    "hed": "icexport.conditions.hed:Hed",
    "lineart": "icexport.conditions.lineart:Lineart",
    "depth": "icexport.conditions.depth:Depth",
}


def names() -> tuple[str, ...]:
    """Return the names that `get` and ``--cond`` take."""
    return tuple(_CONDITIONS)


def register(kind: type[Condition]) -> None:
    """Make a condition known under its name, in the place of one that has it.

    Args:
        kind: a class of its own, with everything that there is to know of the condition.
    """
    _CONDITIONS[kind.name] = kind


def get(name: str, **options: object) -> Condition:
    """Return the condition called ``name``, with its options set.

    Args:
        name: one of `names`.
        **options: fields of its class, for instance ``low_threshold=100`` for canny.

    Raises:
        ConditionError: if the name or an option is unknown, or an option is out of range.
    """
    if name not in _CONDITIONS:
        raise ConditionError(f"There is no condition {name!r}. Known conditions: {', '.join(names())}.")
    found = _CONDITIONS[name]
    kind: type[Condition] = _imported(found) if isinstance(found, str) else found
    return kind().with_options(**options)


def of_model(name: str, model: str, **options: object) -> Condition:
    """Return the condition called ``name`` as it is used with ``model``: see ``Condition.for_model``.

    Args:
        name: one of `names`.
        model: the base model as a user names it: ``reference``, a folder or a Hub id.
        **options: options as for `get`; they win.

    Raises:
        ConditionError: as `get`.
    """
    return get(name).for_model(model).with_options(**options)


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> Any:
    """Return the classes, imported when one is used."""
    places = {str(place).partition(":")[2]: str(place) for place in _CONDITIONS.values() if isinstance(place, str)}
    places["Condition"] = "icexport.conditions.base:Condition"
    if name not in places:
        raise AttributeError(f"module 'icexport.conditions' has no attribute {name!r}")
    return _imported(places[name])
