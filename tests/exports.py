"""Exports that tests share: tracing is nine tenths of a tiny model's build, and most builds trace the same graphs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from icexport.graphs.graph import Graph

_PLAIN = (bool, int, float, str, tuple, type(None))


def sharing(export: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Return ``export_graph`` that traces every graph once and copies the files from ``folder`` afterwards."""

    def shared(graph: Graph, path: Path, symbols: Mapping[str, Any], opset: int) -> None:
        made = folder / _key(graph, path.name, symbols, opset)
        with FileLock(f"{made}.making"):
            if not made.exists():
                unfinished = Path(tempfile.mkdtemp(dir=folder))
                export(graph, unfinished / path.name, symbols, opset)
                unfinished.rename(made)
        graph.module.eval()  # as exporting does
        for file in made.iterdir():
            shutil.copyfile(file, path.with_name(file.name))

    return shared


def _key(graph: Graph, file: str, symbols: Mapping[str, Any], opset: int) -> str:
    """Hash everything that a trace depends on, and a test may have changed: classes, settings, weights, sizes."""
    found = hashlib.sha256(
        repr((graph.name, graph.inputs, graph.outputs, file, sorted(symbols.items()), opset)).encode()
    )
    for name, module in graph.module.named_modules(remove_duplicate=False):
        kind = type(module)
        settings = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
        forward = getattr(module.forward, "__code__", None)
        found.update(repr((name, kind.__module__, kind.__qualname__, sorted(settings.items()))).encode())
        found.update(forward.co_code if forward else b"")
    for name, tensor in _tensors(graph):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _tensors(graph: Graph) -> Iterator[tuple[str, Tensor]]:
    yield from graph.module.named_parameters(remove_duplicate=False)
    yield from graph.module.named_buffers(remove_duplicate=False)
