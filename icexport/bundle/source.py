"""The model that a bundle was made from, found again."""

from __future__ import annotations

from icexport.bundle.store import Bundle
from icexport.errors import CheckpointError
from icexport.models.source import ModelSource


def recorded_source(bundle: Bundle, model: str | None = None) -> ModelSource:
    """Return the model that a bundle was made from, with every file compared.

    Args:
        bundle: the bundle.
        model: where the base model lies now, if it has moved.

    Raises:
        CheckpointError: the model is not there any more, or was changed.
    """
    recorded = bundle.manifest.source
    names = recorded.names | ({"model": model} if model else {})
    source = ModelSource.find(bundle.manifest.condition.name, **names)  # type: ignore[arg-type]
    changed = sorted(n for n in {*source.files, *recorded.files} if source.files.get(n) != recorded.files.get(n))
    if changed:
        raise CheckpointError(
            f"The model at {source.base.path} is not the one that {bundle.path} was made from; different: "
            f"{', '.join(changed)}. Give the right one with --model, or build again."
        )
    return source
