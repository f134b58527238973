"""The model that a bundle was made from, found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from icexport.bundle.source import recorded_source
from icexport.bundle.store import Bundle
from icexport.errors import CheckpointError
from icexport.models.source import ModelSource


def test_all_of_its_parts_are_those_of_the_build(tiny_bundle: Path, dynamic_bundle: Path, tiny_model: Path) -> None:
    whole, probeless = (recorded_source(Bundle(folder)) for folder in (tiny_bundle, dynamic_bundle))

    assert whole.files == ModelSource.find("canny", str(tiny_model)).files
    assert whole.probe is not None
    assert probeless.probe is None, "as it was built, and not the probe that lies there"


def test_another_controlnet_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(tiny_bundle)
    name, *_ = (name for name in bundle.manifest.source.files if name.startswith("controlnet"))
    bundle.manifest.source.files[name] = "0" * 64
    with pytest.raises(CheckpointError, match=f"is not the one that .* was made from; different: {name}"):
        recorded_source(bundle)
