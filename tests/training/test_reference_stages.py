"""Each stage of the reference training for two updates on random pictures: the code runs and moves what it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_tokenizer
from training import controlnet, dataset, probe, unet, vae
from training.data.icons import IconSet
from training.loop import StageConfig
from training.reference import RECIPE, stages

TWO = StageConfig(steps=2, batch_size=2, learning_rate=1e-3, warmup=1)


@pytest.fixture(scope="module")
def pictures() -> IconSet:
    rng = np.random.default_rng(0)
    images = np.full((3, 64, 64, 3), 255, np.uint8)
    images[:, 8:56, 8:56] = rng.integers(0, 200, (3, 1, 1, 3))
    images[:, 20:30, 20:30] = rng.integers(0, 200, (3, 1, 1, 3))
    names = np.array(["left hand", "red apple", "key"])
    return IconSet(images, names, np.array(["flat"] * 3), np.array(["red", "red", "blue"]), np.zeros(3, bool))


def test_normalising_latents_changes_no_reconstruction(pictures: IconSet) -> None:
    torch.manual_seed(0)
    model = vae.new_vae().eval()
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mean).sample
        std = model.encode(pixels).latent_dist.std.mean((0, 2, 3))
        vae.normalise_latents(model, images)
        after = model.decode(model.encode(pixels).latent_dist.mean).sample
        latents = vae.encode(model, images)
        ratio = model.encode(pixels).latent_dist.std.mean((0, 2, 3)) / std
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert (ratio > 0).all()


def test_hue_rotation_keeps_grey_and_comes_back() -> None:
    pixels = torch.rand(2, 3, 4, 4) * 0.4 + 0.3
    third = torch.full((2,), 2 * torch.pi / 3)
    assert torch.allclose(vae.rotate_hue(torch.full((2, 3, 1, 1), 0.5), third), torch.full((2, 3, 1, 1), 0.5))
    assert torch.allclose(vae.rotate_hue(pixels, third), pixels.roll(1, 1), atol=1e-5)


def test_every_stage_trains_only_its_own_model(pictures: IconSet, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(77)
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    autoencoder = vae.train_vae(images, TWO, tmp_path)
    data = dataset.prepare(pictures, autoencoder, tokenizer, 0, tmp_path / "data.safetensors")
    assert data.latents.shape == (9, 4, 16, 16)
    assert data.control_maps.shape == (9, 64, 64)
    assert data.tokens.shape == (9, dataset.CAPTIONS, 77)
    again = dataset.prepare(pictures, autoencoder, tokenizer, 0, tmp_path / "data.safetensors")
    assert torch.equal(data.latents, again.latents)

    denoiser, text_encoder = unet.train_unet(data, tokenizer, TWO, tmp_path)
    frozen = {k: v.clone() for k, v in denoiser.state_dict().items()}
    start = controlnet.new_controlnet(denoiser).state_dict()
    control = controlnet.train_controlnet(data, denoiser, text_encoder, TWO, tmp_path)
    reader = probe.train_probe(data, denoiser, text_encoder, control, TWO, tmp_path)
    assert all(torch.equal(v, frozen[k]) for k, v in denoiser.state_dict().items())
    assert any(not torch.equal(v, start[k]) for k, v in control.state_dict().items())
    assert reader.config.condition == "canny"
    assert not any(p.requires_grad for m in (denoiser, text_encoder, control, reader) for p in m.parameters())


def test_mirrored_captions_swap_left_and_right(pictures: IconSet) -> None:
    rows = dataset._variants(pictures, np.random.default_rng(0))
    names = [row[1] for row in rows]
    assert names == ["left hand", "right hand", "left hand", "red apple", "red apple", "apple", "key", "key", "key"]
    assert np.array_equal(rows[1][0], rows[0][0][:, ::-1])
    assert not np.array_equal(rows[2][0], rows[0][0])


def test_recipe_names_every_stage() -> None:
    assert set(stages(RECIPE)) == {"vae", "unet", "controlnet", "probe"}
