"""Image statistics: distances against closed forms, networks against what feeds them, no FID without its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torchmetrics.image.kid import poly_mmd
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from icexport.conditions.hed import load_network
from icexport.errors import CheckpointError, ConditionError, UsageError
from icexport.host.pixels import to_pixels
from tests.tiny_models import TEXT_LENGTH, tiny_tokenizer
from training.evaluation import features
from training.evaluation.inception import FidInception

CPU = torch.device("cpu")


def images(count: int, width: int = 24, height: int = 20) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def sample(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9 + seed)).double()
    return torch.randn(count, width, generator=generator).double() @ mix + seed


def test_frechet_distance_of_known_sets() -> None:
    a, b = sample(50, 6, 0), sample(80, 6, 1)
    covariances = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert features.frechet_distance(a, b) == pytest.approx(expected)
    assert features.frechet_distance(b, a) == pytest.approx(expected)
    assert features.frechet_distance(a, a + 3) == pytest.approx(6 * 9)


def test_frechet_distance_of_fewer_pictures_than_features() -> None:
    a, b = sample(5, 40, 0), sample(7, 40, 1)
    assert features.frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(a.var(0).sum()))
    # Singular covariances: tr sqrt(AB) is the sum of the singular values of the centred sets' product.
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(c.square().sum() for c in centred) - 2 * shared
    assert features.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_kernel_distance_is_kids_and_has_no_bias() -> None:
    a, b = sample(40, 6, 0), sample(40, 6, 1)
    assert features.kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)))
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(300):
        x, y = torch.randn(10, 4, generator=generator), torch.randn(16, 4, generator=generator)
        values.append(features.kernel_distance(x, y))
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0


@pytest.mark.parametrize("distance", [features.frechet_distance, features.kernel_distance])
def test_sets_that_cannot_be_compared(distance) -> None:
    for a, b in (
        (sample(1, 4, 0), sample(5, 4, 0)),
        (sample(5, 3, 0), sample(5, 4, 0)),
        (torch.zeros(4), torch.zeros(4)),
    ):
        with pytest.raises(UsageError, match="two sets"):
            distance(a, b)


def test_hed_features_are_the_fourth_block_s(hed_file: Path) -> None:
    network, seen = load_network(hed_file), []
    network.blocks[3].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pictures = images(2)
    pixels = torch.cat([to_pixels(picture) for picture in pictures])
    with torch.no_grad():
        network(pixels)
    found = features.HedVgg16(hed_file, CPU)(pictures)
    assert found.shape == (2, 512)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, seen[0].mean((2, 3)).double(), rtol=1e-4, atol=1e-3)
    assert "FID" not in features.HedVgg16.title


@pytest.fixture(scope="module")
def inception_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return FidInception().state_dict()


def test_inception(inception_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """pytorch-fid's file: 1008 classes, and batch norms without their counters in old versions of it."""
    state = {name: value for name, value in inception_state.items() if not name.endswith("num_batches_tracked")}
    assert len(inception_state) == 566
    assert sum(value.numel() for name, value in state.items() if "running" not in name) == 23_850_960
    save_file(state, tmp_path / "inception.safetensors")
    extractor = features.Inception(tmp_path / "inception.safetensors", CPU)
    assert extractor(images(1)).shape == (1, 2048)
    assert extractor.title == "FID"


def test_other_inception_weights_are_refused(inception_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({**inception_state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(CheckpointError, match="torchvision's Inception"):
        features.Inception(path, CPU)
    save_file({"fc.weight": inception_state["fc.weight"]}, path)
    with pytest.raises(ConditionError, match="Tensors missing: Conv2d_1a_3x3"):
        features.Inception(path, CPU)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConditionError, match="cannot be read"):
        features.Inception(path, CPU)


def test_inception_pools_as_the_graph_of_2015_does() -> None:
    """Constant features stay constant at the border, since padding does not count; torchvision's get smaller there."""
    from training.evaluation.inception import _average

    torch.testing.assert_close(_average(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))


def test_resizing_is_not_rounded_and_does_not_alias() -> None:
    large = features.resize_like_clean_fid(Image.fromarray(np.array([[[0, 9, 255], [9, 0, 0]]], dtype=np.uint8)))
    assert large.shape == (3, 299, 299)
    assert large.dtype == np.float32
    assert large.min() == 0
    assert large.max() == 255
    assert len(np.unique(large[1])) > 20
    board = Image.fromarray((np.indices((598, 598)).sum(0)[..., None] % 2 * np.full(3, 255)).astype("uint8"))
    assert np.abs(features.resize_like_clean_fid(board)[:, 5:-5, 5:-5] - 127.5).max() < 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score(clip_folder: Path) -> None:
    pictures, captions = images(4), ["a", "bcd ef", "!!", "g" * 40]  # the last is longer than the text encoder takes
    found = features.ClipScore(str(clip_folder), CPU)(pictures, captions)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    expected = []
    for picture, caption in zip(pictures, captions, strict=True):
        inputs = processor(text=[caption], images=[picture], return_tensors="pt", truncation=True)
        with torch.no_grad():
            expected.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()) * 100)
    assert min(expected) < 0 < max(expected)
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-4)


def test_a_clip_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="CLIP model"):
        features.ClipScore(str(tmp_path), CPU)
