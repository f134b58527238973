"""``icexport gc``: remove engines that no bundle needs any more."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from icexport.cli.console import emit, show
from icexport.cli.options import EngineStore, Json


def gc(
    engine_store: EngineStore = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove stored engines that no bundle needs.

    Engines are kept in one place, so that bundles that differ in a part need not build the others again. Bundles have
    files of their own and work without the store.
    """
    from icexport.bundle.engine_store import EngineStore

    store = EngineStore(engine_store)
    removed = [asdict(row) for row in store.collect(dry_run)]
    document = {"store": str(store.root), "dry_run": dry_run, "bytes": sum(row["bytes"] for row in removed)}
    if as_json:
        emit({**document, "removed": removed})
    else:
        megabytes = document.pop("bytes") / 1e6
        show({**document, "MB": megabytes, "removed": removed or "nothing"})
