"""Faults put in by hand: each is found by the gate, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest

from icexport.bundle.manifest import MANIFEST_NAME
from icexport.bundle.source import recorded_source
from icexport.bundle.store import Bundle
from icexport.errors import ParityError
from icexport.gates.parity_gate import expected_of, parity_gate
from icexport.models.precision import precision
from icexport.parity.compare import Expected
from icexport.progress import silent
from tests.hashing import hash_files
from tests.icexport.gates.faults import FAULTS


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> dict[str, Sequence[Expected]]:
    bundle = Bundle(tiny_bundle)
    return dict(expected_of(recorded_source(bundle), precision("fp32"), bundle.manifest.profile, silent))


@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_finds_it(
    name: str, tiny_bundle: Path, expected: dict[str, Sequence[Expected]], tmp_path: Path
) -> None:
    fault = FAULTS[name]
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    paths = [*folder.glob(f"engines/*/{fault.graph}.onnx"), folder / "graphs" / f"{fault.graph}.onnx"]
    model = onnx.load(paths[0], load_external_data=False)
    fault.make(model)
    onnx.save(model, paths[0])
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": hash_files(folder)}))
    bundle = Bundle(folder)

    with pytest.raises(ParityError) as caught:
        parity_gate(bundle, recorded_source(bundle), {fault.graph: expected[fault.graph]}, ["onnxruntime"], silent)

    assert fault.named in str(caught.value)
