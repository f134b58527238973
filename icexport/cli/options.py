"""Options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from icexport.backends.table import BACKENDS
from icexport.conditions import names
from icexport.models.precision import PRECISIONS

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def _known(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in ("auto", *BACKENDS)]:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from auto, {', '.join(BACKENDS)}.")
    return names


def _backends(names: list[str] | None) -> list[str] | None:
    return names and _known(names)


def _backend(name: str) -> str:
    return _known([name])[0]


def _device(name: str | None) -> str | None:
    if name is not None and not _DEVICE.fullmatch(name):
        raise typer.BadParameter(f"{name}: choose cpu, cuda or cuda:N.")
    return name


def _dtype(name: str) -> str:
    if name not in PRECISIONS:
        raise typer.BadParameter(f"{name}: choose from {', '.join(PRECISIONS)}.")
    return name


_BACKEND_NAMES = "; ".join(f"{backend.name}: {backend.summary}" for backend in BACKENDS.values())

*_FIRST, _LAST = names()
CONDITIONS = f"{', '.join(_FIRST)} or {_LAST}"
"""The names of all conditions, for people."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", metavar="NAME", callback=_backends, help=f"auto, or: {_BACKEND_NAMES}. Repeatable."),
]
Backend = Annotated[
    str,
    typer.Option("--backend", metavar="NAME", callback=_backend, help="auto, or one that the bundle is built for."),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="|".join(PRECISIONS), callback=_dtype, help="Precision of the graphs."),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        callback=_device,
        help="cpu, cuda or cuda:N.  [default: cpu; cuda for TensorRT]",
    ),
]
Preflight = Annotated[
    bool,
    typer.Option(
        "--preflight/--no-preflight",
        help="Refuse at once what will not fit into memory or on the disk, or try it all the same.",
    ),
]
EngineStore = Annotated[
    Path | None,
    typer.Option(
        "--engine-store",
        metavar="DIR",
        file_okay=False,
        help="Where built engines are kept for other bundles.  [default: $ICEXPORT_CACHE, or the user's cache]",
    ),
]
