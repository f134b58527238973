"""Fixtures that the tests share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import icexport
from tests.tiny_models import save_tiny_model

pytest_plugins = ("tests.skips",)

# Tracing makes objects by the million that stay, and looking through them for garbage takes a tenth of its time.
gc.set_threshold(50_000, 50, 100)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of the test processes makes and all of them use."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, ready = root / name, root / f"{name}.ready"
    with FileLock(root / f"{name}.making"):
        if not ready.exists():
            make(folder)
            ready.touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def shared_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds take the graphs of equal models from each other; `export_graph` itself is tested where it lives.

    `ICEXPORT_TEST_EXPORTS` names a folder that other runs may use, too: it is good for one state of what exports.
    """
    if "torch" not in sys.modules:  # no test of this run builds, and importing the exporter takes seconds
        yield
        return
    from icexport.builder import writer
    from tests.exports import sharing

    kept = os.environ.get("ICEXPORT_TEST_EXPORTS")
    folder = Path(kept) if kept else once(tmp_path_factory, "exports", Path.mkdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "export_graph", sharing(writer.export_graph, folder))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete model; do not write into it."""
    return once(tmp_path_factory, "tiny-model", save_tiny_model)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Bundle of `tiny_model` for both backends, 16 x 16 px, up to 4 pictures; do not write into it."""
    backends = ["onnxruntime", "torch"]
    return once(
        tmp_path_factory,
        "tiny-bundle",
        lambda folder: icexport.build("canny", model=str(tiny_model), backend=backends, output=folder),
    )


@pytest.fixture(scope="session")
def dynamic_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Bundle of `tiny_model` without a probe, 16 to 32 px high and wide; do not write into it."""
    sizes = {"height": "16:16:32", "width": "16:16:32"}
    return once(
        tmp_path_factory,
        "dynamic-bundle",
        lambda folder: icexport.build(
            "canny", model=str(tiny_model), probe="none", backend="onnxruntime", output=folder, **sizes
        ),
    )


@pytest.fixture(scope="session")
def rtx_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Bundle of `tiny_model` in fp16 with TensorRT-RTX plans for two GPUs; its store is `store` beside it."""
    options: dict[str, Any] = {"dtype": "fp16", "backend": "tensorrt-rtx", "target_sm": (89, 86)}
    return once(
        tmp_path_factory,
        "rtx-bundle",
        lambda folder: icexport.build(
            "canny", model=str(tiny_model), output=folder, engine_store=folder.with_name("rtx-store"), **options
        ),
    )
