"""Line drawings: the difference of Gaussians against OpenCV, and loading of the learned generator."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from icexport.conditions import get
from icexport.conditions.lineart import DrawingGenerator
from icexport.errors import ConditionError


def drawing(size: tuple[int, int] = (90, 70)) -> Image.Image:
    """Dark strokes on a light, uneven ground."""
    generator = np.random.default_rng(0)
    picture = np.full((size[1], size[0], 3), 210, np.uint8) - generator.integers(
        0, 12, (size[1], size[0], 3), np.uint8
    )
    for _ in range(6):
        start, end = (tuple(int(v) for v in generator.integers(0, min(size), 2)) for _ in range(2))
        cv2.line(picture, start, end, tuple(int(v) for v in generator.integers(0, 90, 3)), 2)
    return Image.fromarray(picture)


def test_difference_of_gaussians_matches_opencv() -> None:
    image = drawing()
    pixels = np.array(image).astype(np.float32)
    darker = (cv2.GaussianBlur(pixels, (0, 0), 6.0) - pixels).min(axis=2).clip(0, 255)
    expected = (127 * darker / max(16, np.median(darker[darker > 8]))).clip(0, 255)
    got = np.array(get("lineart").extract(image))[..., 0]
    assert expected.max() > 127
    np.testing.assert_allclose(got, expected, atol=0.6)


def test_lines_are_white_on_black() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (30, 0, 32, 64))
    lines = np.array(get("lineart").extract(picture))[..., 0]
    assert lines[:, 30:32].min() > 120
    assert lines[:, :20].max() == lines[:, 45:].max() == 0


@pytest.mark.parametrize("shape", [(1, 3, 20, 9), (1, 3, 2, 2)])
def test_small_pictures(shape: tuple[int, ...]) -> None:
    lines = get("lineart").extract_batch(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    assert lines.shape == shape
    assert lines.isfinite().all()


def test_each_picture_has_its_own_scale() -> None:
    pixels = torch.from_numpy(np.array(drawing())).permute(2, 0, 1)[None] / 255
    faint = 0.5 + 0.3 * pixels
    batched = get("lineart").extract_batch(torch.cat([pixels, faint]))
    torch.testing.assert_close(batched[1:], get("lineart").extract_batch(faint))


def test_gradient_reaches_the_pixels() -> None:
    pixels = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    get("lineart").extract_batch(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{"sigma": 0}, {"threshold": -1}, {"threshold": 256}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConditionError, match="sigma > 0"):
        get("lineart", **options)


@pytest.fixture(scope="module")
def generator() -> DrawingGenerator:
    torch.manual_seed(0)
    return DrawingGenerator().eval()


def test_generator_has_the_names_of_the_public_weights(generator: DrawingGenerator) -> None:
    layers = ["model0.1", "model1.0", "model1.3", "model3.0", "model3.3", "model4.1"]
    layers += [f"model2.{block}.conv_block.{layer}" for block in range(3) for layer in (1, 5)]
    assert set(generator.state_dict()) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_learned_lines_are_the_inverted_drawing(generator: DrawingGenerator, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sk_model{suffix}"
    if suffix == ".pth":
        torch.save(generator.state_dict(), path)
    else:
        save_file(generator.state_dict(), path)
    pixels = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lines = get("lineart", weights=path).extract_batch(pixels)
    torch.testing.assert_close(lines[:, :1], 1 - generator(pixels))
    lines.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert get("lineart", weights=str(path)).extract(Image.new("RGB", (21, 18))).size == (21, 18)


def test_wrong_tensors_are_all_listed(generator: DrawingGenerator, tmp_path: Path) -> None:
    state = generator.state_dict()
    del state["model0.1.bias"], state["model4.1.weight"]
    save_file({**state, "extra": torch.zeros(1), "model3.0.bias": torch.zeros(7)}, tmp_path / "x.safetensors")
    with pytest.raises(ConditionError) as error:
        get("lineart", weights=tmp_path / "x.safetensors").extract(drawing())
    for part in ("missing: model0.1.bias, model4.1.weight", "unexpected: extra", "model3.0.bias [7] instead of [128]"):
        assert part in str(error.value)


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=2))
    with pytest.raises(ConditionError, match="cannot be read"):
        get("lineart", weights=tmp_path / "bad.pth").extract(drawing())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["none.safetensors", "broken.safetensors", "list.pth"])
def test_unusable_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not a safetensors file")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConditionError, match=name):
        get("lineart", weights=tmp_path / name).extract(drawing())
