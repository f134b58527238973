"""Each stage of the reference training for two updates on random pictures: the code runs and moves what it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline

from icexport import conditions
from icexport.models.probe import InnerControlProbe
from tests.tiny_models import tiny_tokenizer
from training.data.icons import IconSet
from training.data.scenes import SceneSet, render_many
from training.loop.trainer import TrainerConfig
from training.reference import autoencoder, denoiser, pictures, stages
from training.reference.depth import Estimator, new_estimator
from training.tasks.frozen import BaseModels

TWO = TrainerConfig(steps=2, batch_size=2, learning_rate=1e-3, checkpoint_every=2)


@pytest.fixture(scope="module")
def icons() -> IconSet:
    rng = np.random.default_rng(0)
    images = np.full((3, 64, 64, 3), 255, np.uint8)
    images[:, 8:56, 8:56] = rng.integers(0, 200, (3, 1, 1, 3))
    images[:, 20:30, 20:30] = rng.integers(0, 200, (3, 1, 1, 3))
    names = np.array(["left hand", "red apple", "key"])
    return IconSet(images, names, np.array(["flat"] * 3), np.array(["red", "red", "blue"]), np.zeros(3, bool))


@pytest.fixture(scope="module")
def scenes() -> SceneSet:
    return render_many(range(2))


def test_normalising_latents_changes_no_reconstruction(icons: IconSet) -> None:
    torch.manual_seed(0)
    model = autoencoder.new_vae().eval()
    images = torch.from_numpy(icons.images).permute(0, 3, 1, 2)
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mean).sample
        std = model.encode(pixels).latent_dist.std.mean((0, 2, 3))
        autoencoder.normalise_latents(model, images)
        after = model.decode(model.encode(pixels).latent_dist.mean).sample
        latents = autoencoder.encode(model, images)
        ratio = model.encode(pixels).latent_dist.std.mean((0, 2, 3)) / std
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert (ratio > 0).all()


def test_hue_rotation_keeps_grey_and_comes_back() -> None:
    pixels = torch.rand(2, 3, 4, 4) * 0.4 + 0.3
    third = torch.full((2,), 2 * torch.pi / 3)
    assert torch.allclose(autoencoder.rotate_hue(torch.full((2, 3, 1, 1), 0.5), third), torch.full((2, 3, 1, 1), 0.5))
    assert torch.allclose(autoencoder.rotate_hue(pixels, third), pixels.roll(1, 1), atol=1e-5)


def test_every_stage_trains_only_its_own_model(icons: IconSet, scenes: SceneSet, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(77)
    names = ("vae", "unet", "depth-estimator", "controlnet-canny", "probe-canny")
    run = stages.Stages(dict.fromkeys(names, TWO), tmp_path).run
    rooms = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(0)
    vae = stages._autoencoder(run, "vae", autoencoder.new_vae, rooms)
    again = stages._autoencoder(run, "vae", autoencoder.new_vae, rooms)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))

    data = pictures.prepare(tmp_path / "data", lambda: pictures.build(icons, vae, tokenizer, 0, scenes))
    assert data.latents.shape == (9 + 4, 4, 16, 16)
    assert data.tokens.shape == (9 + 4, pictures.CAPTIONS, 77)
    cached = pictures.prepare(tmp_path / "data", lambda: pytest.fail("built twice"))
    assert torch.equal(data.latents, cached.latents)
    assert torch.equal(data.images[-1], data.images[-2].flip(-1))

    unet, text_encoder = stages._denoiser(
        run, "unet", lambda: (denoiser.new_unet(), denoiser.new_text_encoder(tokenizer)), data
    )
    models = BaseModels(unet, vae, text_encoder, tokenizer, denoiser.noise_scheduler())
    estimator = stages._estimator(run, models, rooms, torch.from_numpy(scenes.depth))
    frozen = {k: v.clone() for k, v in unet.state_dict().items()}
    start = stages.new_controlnet(unet)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    canny = conditions.get("canny")
    index, maps = stages._maps(tmp_path / "maps.safetensors", canny, data, scenes)
    controlnet = stages._controlnet(run, "controlnet-canny", start, models, canny, data.subset(index), maps)
    probe = stages._probe(run, "probe-canny", models, canny, controlnet, data.subset(index), maps)
    assert all(torch.equal(v, frozen[k]) for k, v in unet.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in controlnet.state_dict().items())
    assert probe.config.condition == "canny"

    stages.save_base(models, estimator, tmp_path / "model")
    stages.save_control("canny", controlnet, probe, tmp_path / "model")
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "model").rglob("config.json"))
    assert next(iter(unet.parameters())).dtype == torch.float32, "saving must not halve the model itself"
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    ControlNetModel.from_pretrained(tmp_path / "model" / "controlnet-canny")
    InnerControlProbe.from_pretrained(tmp_path / "model" / "probe-canny")
    reader = conditions.get("depth", model=tmp_path / "model" / "depth-estimator")
    assert reader.extract_batch(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_depth_maps_belong_to_the_scenes_at_the_end(scenes: SceneSet, tmp_path: Path) -> None:
    images = torch.zeros(7, 3, 64, 64, dtype=torch.uint8)
    data = pictures.DiffusionSet(images, torch.zeros(7, 4, 16, 16), torch.zeros(7, 6, 77), torch.zeros(77))
    index, maps = stages._maps(tmp_path / "none", conditions.get("depth"), data, scenes)
    assert index.tolist() == [3, 4, 5, 6]
    depth = torch.from_numpy(scenes.depth)
    assert torch.equal(maps[2], depth[1])
    assert torch.equal(maps[3], depth[1].flip(-1))


def test_the_estimator_reads_what_its_processor_would_prepare() -> None:
    torch.manual_seed(0)
    model = new_estimator().eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        direct = model(pixels * 2 - 1).predicted_depth
        assert torch.allclose(Estimator(model)(pixels), direct, atol=1e-6)


def test_mirrored_captions_swap_left_and_right(icons: IconSet) -> None:
    rows = pictures._variants(icons, np.random.default_rng(0))
    names = [row[1] for row in rows]
    assert names == ["left hand", "right hand", "left hand", "red apple", "red apple", "apple", "key", "key", "key"]


def test_the_recipe_names_every_stage() -> None:
    settings = stages.stages(stages.RECIPE)
    wanted = {"vae", "unet", "controlnet", "vae-scenes", "unet-scenes", "depth-estimator"}
    wanted |= {f"{part}-{name}" for part in ("controlnet", "probe") for name in conditions.names()}
    assert settings.keys() == wanted
    assert settings["probe-hed"].ema_decay == 0.999


def test_a_stage_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[vae]\nsteps = 1\nspeed = 2\n")
    with pytest.raises(TypeError, match="speed"):
        stages.stages(recipe)
