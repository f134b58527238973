"""Faults put in by hand: each is found by the gate, and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import icexport
from benchmarks.real_size.model import write_model
from icexport.bundle.manifest import MANIFEST_NAME
from icexport.bundle.source import recorded_source
from icexport.bundle.store import Bundle
from icexport.errors import ParityError
from icexport.gates.parity_gate import expected_of, parity_gate
from icexport.host.files import sha256
from icexport.models.precision import precision
from icexport.parity.compare import Expected
from icexport.progress import silent
from tests.icexport.gates.faults import FAULTS, REAL_NAMES, Fault


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> dict[str, Sequence[Expected]]:
    return references(tiny_bundle)


def references(folder: Path) -> dict[str, Sequence[Expected]]:
    bundle = Bundle(folder)
    return dict(expected_of(recorded_source(bundle), precision("fp32"), bundle.manifest.profile, silent))


def check(fault: Fault, healthy: Path, expected: dict[str, Sequence[Expected]], folder: Path) -> None:
    """Put a fault into a copy of a bundle, whose files it shares but for the graph, and let the gate find it."""
    shutil.copytree(healthy, folder, copy_function=os.link)
    paths = [*folder.glob(f"engines/*/{fault.graph}.onnx"), folder / "graphs" / f"{fault.graph}.onnx"]
    model = onnx.load(paths[0], load_external_data=False)
    fault.make(model)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for path in (paths[0], folder / MANIFEST_NAME):
        path.unlink()  # the healthy bundle keeps its own
    onnx.save(model, paths[0])
    manifest["files"][paths[0].relative_to(folder).as_posix()] = sha256(paths[0])
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    bundle = Bundle(folder)

    with pytest.raises(ParityError) as caught:
        parity_gate(bundle, recorded_source(bundle), {fault.graph: expected[fault.graph]}, ["onnxruntime"], silent)

    assert fault.named in str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_finds_it(
    name: str, tiny_bundle: Path, expected: dict[str, Sequence[Expected]], tmp_path: Path
) -> None:
    check(FAULTS[name], tiny_bundle, expected, tmp_path / "bundle")


@pytest.fixture(scope="module")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stable Diffusion 1.5's architecture at 512 px: 13 GB on the disk while the tests run."""
    folder = tmp_path_factory.mktemp("real-size")
    write_model(folder / "model", "sd15")
    options: dict[str, Any] = {"model": str(folder / "model"), "backend": "onnxruntime", "batch_size": 1}
    yield icexport.build("canny", **options, verify=False, output=folder / "bundle").path
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def real_expected(real_bundle: Path) -> dict[str, Sequence[Expected]]:
    return references(real_bundle)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_finds_it_at_the_real_size(
    name: str, real_bundle: Path, real_expected: dict[str, Sequence[Expected]]
) -> None:
    folder = real_bundle.parent / "faulty"
    try:
        check(
            replace(FAULTS[name], named=REAL_NAMES.get(name, FAULTS[name].named)), real_bundle, real_expected, folder
        )
    finally:
        shutil.rmtree(folder)
