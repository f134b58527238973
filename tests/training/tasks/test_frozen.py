"""Loading the frozen networks, starting ControlNets, and validation pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

from icexport.conditions import Hed
from icexport.errors import CheckpointError, ConditionError, UsageError
from icexport.models.base_model import find_base
from icexport.reference import reference_path
from tests.training.tiny_training import CANNY, networks, pictures, seeded
from training.tasks.frozen import BaseModels, Noised, load_base, new_controlnet, noised
from training.tasks.validation import Validation, ValidationConfig


def test_a_base_model_is_frozen_and_keeps_its_noise_schedule(tiny_model: Path) -> None:
    models = load_base(str(tiny_model), torch.bfloat16)
    networks = (models.unet, models.vae, models.text_encoder)
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for n in networks for p in n.parameters())
    assert models.scheduler.config["beta_schedule"] == "scaled_linear"
    assert not models.scheduler.config["clip_sample"]
    assert (models.steps, models.size, models.multiple) == (1000, 16, 4)


def test_the_reference_model_is_found_by_name_and_others_are_refused(tmp_path: Path) -> None:
    assert find_base("reference").path == reference_path()
    with pytest.raises(CheckpointError, match=r"lacks unet/config\.json"):
        find_base(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
        ({}, "latent channels of unet and vae differ: 9 and 4"),
    ],
)
def test_other_families_are_refused(tiny_model: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tiny_model / "unet/config.json").read_text())
    unet = UNet2DConditionModel.from_config({**config, "in_channels": 4 if change else 9})
    unet.save_pretrained(tmp_path / "model/unet")
    if change:
        file = tmp_path / "model/unet/config.json"
        extra = {**change, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16}
        UNet2DConditionModel.from_config({**config, **extra}).save_pretrained(file.parent)
    with pytest.raises(UsageError, match=message):
        load_base(str(tmp_path / "model"))


def test_a_new_controlnet_copies_the_encoder_and_shrinks_the_map_as_the_autoencoder_does(tiny_model: Path) -> None:
    models, _, _ = networks(tiny_model)
    controlnet = new_controlnet(models)
    assert torch.equal(controlnet.conv_in.weight, models.unet.conv_in.weight)
    models.check_fit("canny", controlnet, None)
    sample = noised(pictures(models), models, CANNY, seeded(), 0)
    down, mid = controlnet(sample.noisy, sample.timesteps, sample.text, sample.control, return_dict=False)
    assert not any(residual.any() for residual in (*down, mid))


def test_a_controlnet_of_another_architecture_is_refused(tiny_model: Path) -> None:
    models, controlnet, _ = networks(tiny_model)
    controlnet.register_to_config(cross_attention_dim=8, conditioning_embedding_out_channels=(8, 16, 32))
    with pytest.raises(UsageError) as error:
        models.check_fit("canny", controlnet, None)
    assert "text width of controlnet and text_encoder differ: 8 and 16" in str(error.value)
    assert "pixels per latent cell of controlnet and vae differ: 4 and 2" in str(error.value)


def test_noise_control_and_prompts_come_from_the_generator_and_the_batch(tiny_model: Path) -> None:
    models, _, _ = networks(tiny_model)
    batch = pictures(models, 40)
    sample, again = (noised(batch, models, CANNY, seeded(), 0.5) for _ in range(2))
    assert all(torch.equal(a, vars(again)[name]) for name, a in vars(sample).items())
    assert sample.timesteps.unique().numel() > 30
    assert torch.equal(sample.control, CANNY.extract_batch(batch["pixels"]))
    empty = models.embed(models.empty_ids[None])
    dropped = sum(torch.allclose(text, empty[0], atol=1e-6) for text in sample.text)
    assert 10 <= dropped <= 30
    signal = models.scheduler.alphas_cumprod[sample.timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * sample.latents + (1 - signal).sqrt() * sample.noise
    assert torch.allclose(sample.noisy, noisy, atol=1e-5)


def drawn(models: BaseModels, count: int, text_dropout: float) -> list[Noised]:
    """Many small batches of one generator; every prompt is the same one, which is not empty."""
    generator = seeded(3)
    batch = {
        "latents": torch.zeros(250, 4, 2, 2),
        "control": torch.zeros(250, 3, 4, 4),
        "input_ids": models.tokenize(["square"]).expand(250, -1),
    }
    return [noised(batch, models, CANNY, generator, text_dropout) for _ in range(count // 250)]


def test_timesteps_are_uniform_from_the_first_to_the_last(tiny_model: Path) -> None:
    models, _, _ = networks(tiny_model)
    found = torch.cat([sample.timesteps for sample in drawn(models, 4000, 0.0)])
    tenths = torch.histc(found.float(), 10, 0, models.steps)
    assert tenths.sum() == 4000
    assert (tenths - 400).abs().max() < 80, "4.2 standard deviations"
    assert found.min() < 5
    assert found.max() >= models.steps - 5


def test_every_timestep_can_be_drawn_and_no_other(tiny_model: Path) -> None:
    models, _, _ = networks(tiny_model)
    models.scheduler = DDPMScheduler.from_config(models.scheduler.config, num_train_timesteps=7)
    found = torch.cat([sample.timesteps for sample in drawn(models, 500, 0.0)])
    assert found.unique().tolist() == list(range(7))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_as_many_prompts_are_dropped_as_asked(tiny_model: Path, share: float) -> None:
    models, _, _ = networks(tiny_model)
    empty = models.embed(models.empty_ids[None])[0]
    texts = torch.cat([sample.text for sample in drawn(models, 3000, share)])
    dropped = (texts - empty).abs().amax((1, 2)) < 1e-5
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.025)  # 4.5 standard deviations
    if 0 < share < 1:
        times = torch.cat([sample.timesteps for sample in drawn(models, 3000, share)]).float()
        assert times[dropped].mean().item() == pytest.approx(models.steps / 2, abs=70), "whatever the timestep"


def test_latents_are_samples_of_the_posterior(tiny_model: Path) -> None:
    models, _, _ = networks(tiny_model)
    count, scale = 400, float(models.vae.config["scaling_factor"])
    pixels = pictures(models, 1)["pixels"]
    with torch.no_grad():
        posterior = models.vae.encode(2 * pixels - 1).latent_dist
    batch = {"pixels": pixels.expand(count, -1, -1, -1), "input_ids": models.tokenize(["a"] * count)}
    latents = noised(batch, models, CANNY, seeded(), 0.0).latents
    scores = (latents / scale - posterior.mean) / posterior.std
    assert posterior.std.min() > 1e-3
    assert scores.mean().item() == pytest.approx(0, abs=0.02)
    assert scores.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(models.encode(pixels, None), scale * posterior.mean, rtol=1e-4, atol=1e-5)


def test_validation_draws_maps_beside_pictures_and_touches_neither_weights_nor_random_numbers(
    tiny_model: Path, tmp_path: Path
) -> None:
    models, controlnet, _ = networks(tiny_model)
    batch = pictures(models, 2)
    batch |= {"captions": batch["ids"], "control": CANNY.extract_batch(batch["pixels"])}
    before = {k: v.clone() for m in (controlnet, models.unet, models.vae) for k, v in m.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    validation = Validation(models, CANNY, batch, ValidationConfig(count=2, steps=2))
    found = [validation(controlnet, tmp_path) for _ in range(2)]
    picture = Image.open(tmp_path / "pictures.png")
    assert picture.size == (32, 32)
    left = torch.from_numpy(np.array(picture)[:, :16]).view(2, 16, 16, 3)
    assert torch.equal(left.permute(0, 3, 1, 2) / 255, batch["control"])
    assert found[0] == found[1]
    assert 0 <= found[0]["score"] <= 1
    assert torch.equal(torch.get_rng_state(), state)
    after = {k: v for m in (controlnet, models.unet, models.vae) for k, v in m.state_dict().items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_pictures_that_cannot_be_scored_are_drawn_and_said_so_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models, controlnet, _ = networks(tiny_model)
    batch = {"captions": ["a"], "control": torch.rand(1, 3, 16, 16)}

    def score(*_: object) -> None:
        raise ConditionError("the weights are not installed")

    monkeypatch.setattr(Hed, "score", score)
    validation = Validation(models, Hed(), batch, ValidationConfig(steps=1))
    assert [validation(controlnet, tmp_path) for _ in range(2)] == [{}, {}]
    assert (tmp_path / "pictures.png").exists()
    assert [r.message for r in caplog.records].count(
        "Validation pictures are not scored: the weights are not installed"
    ) == 1


def test_validation_settings_are_checked_together() -> None:
    with pytest.raises(UsageError, match=r"count is 0, expected 1 or more; guidance is -1"):
        ValidationConfig(count=0, guidance=-1)
