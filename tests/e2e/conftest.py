"""Fixtures of the tests on the reference model."""

from __future__ import annotations

import pytest
import torch
from filelock import FileLock

import icexport
from tests.e2e.drawings import PROMPTS, drawing


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> icexport.Bundle:
    """The reference bundle, built once for all test processes."""
    folder = tmp_path_factory.getbasetemp().parent / "reference-bundle"
    with FileLock(f"{folder}.lock"):
        return icexport.build("canny", output=folder)


@pytest.fixture(scope="session")
def pipe(bundle: icexport.Bundle) -> icexport.InnerControlPipeline:
    found = icexport.InnerControlPipeline.from_pretrained(bundle)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="session")
def control_maps() -> torch.Tensor:
    canny = icexport.conditions.get("canny")
    maps = [canny.extract(drawing(i)) for i in range(len(PROMPTS))]
    pixels = torch.stack([torch.tensor(list(m.getdata())).view(64, 64, 3).permute(2, 0, 1) for m in maps])
    return pixels.float() / 255
