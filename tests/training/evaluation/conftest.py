"""Small sets of pictures and random extractors that the tests of the evaluation share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from icexport.conditions.hed import HedNetwork

SIDE = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(scope="session")
def held_out_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of 16 px with captions; do not write into it."""
    folder = tmp_path_factory.mktemp("held-out")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        levels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))
        Image.fromarray(levels).save(folder / f"p{i}.png")
        rows.append(json.dumps({"file_name": f"p{i}.png", "text": f"a {'bcdef'[i]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def hed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edge network with random weights of a sensible size."""
    torch.manual_seed(0)
    network = HedNetwork()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("hed") / "hed.safetensors"
    save_file(network.state_dict(), path)
    return path
