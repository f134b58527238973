"""Every building block of the ControlNet loss against `plain_reference`, to 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextModel, DPTForDepthEstimation

from icexport import conditions
from icexport.conditions import Condition
from icexport.conditions import hed as hed_condition
from icexport.fidelity.normalise import control_target, normalise
from icexport.models.align import NORMALISERS, to_official
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.taps import TapKind, Taps
from tests.tiny_models import TEXT_LENGTH, randomise, save_tiny_depth, tiny_tokenizer, tiny_unet
from tests.training import plain_reference as plain
from training.tasks.controlnet import ControlNetTask
from training.tasks.extractors import reward_extractor
from training.tasks.frozen import BaseModels
from training.tasks.losses import (
    LossConfig,
    alignment_loss,
    diffusion_loss,
    in_range,
    masked_mean,
    predict_original,
    reward_loss,
)

SIDE, LATENT = 16, 8
GROUPS = 4
TIMESTEPS = [0, 130, 200, 201, 920, 921]
LOSS = LossConfig(alpha=0.5, reward_range=(0, 200), beta=1.0, alignment_range=(0, 920))
# At this seed no ReLU is nearer to its kink than 6e-6 of its mean input: there, rounding would decide on the gradient.
SEED = 7
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = [
    ("canny", "attn", "v_prediction"),
    ("hed", "conv", "epsilon"),
    ("lineart", "attn", "epsilon"),
    ("depth", "conv", "v_prediction"),
]

Extractors = dict[str, tuple[Condition, Callable[[Tensor], Tensor]]]

close = partial(assert_close, rtol=1e-5, atol=1e-5)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(batch: int, seed: int) -> Tensor:
    """Coarse random fields with some texture."""
    coarse = torch.nn.functional.interpolate(rand(batch, 3, 6, 6, seed=seed), (SIDE, SIDE), mode="bicubic")
    return (coarse + 0.1 * randn(batch, 3, SIDE, SIDE, seed=seed)).clamp(0, 1)


@dataclass
class Networks:
    """One tiny model; the VAE's factor is 2, and its pictures have contrast."""

    kind: TapKind
    condition: str
    unet: UNet2DConditionModel = field(default_factory=tiny_unet)

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False)
        self.controlnet = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=(8, 16))
        randomise(self.controlnet, 2)
        torch.manual_seed(3)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        self.vae = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=4, latent_channels=4, **blocks).eval()
        with torch.no_grad():
            self.vae.decoder.conv_out.weight.mul_(4)
        self.vae.requires_grad_(False)
        self.probe = probe_for(self.unet, self.kind, self.condition).requires_grad_(False)


def probe_for(unet: UNet2DConditionModel, kind: TapKind, condition: str = "canny") -> InnerControlProbe:
    """The official head's layout in small; no norm is an identity, no mixing weight like the others."""
    torch.manual_seed(4)
    width = unet.time_embedding.linear_2.out_features
    config = ProbeConfig(
        dims=Taps(unet, kind).dims,
        projection_dim=32,
        num_groups=GROUPS,
        head_dims=(8, 4),
        time_embed_dim=width,
        tap_kind=kind,
        condition=condition,
        normaliser=NORMALISERS.get(condition, "identity"),
    )
    probe = InnerControlProbe(config).eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return probe


@pytest.fixture(scope="module")
def hed_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights of a HED with few channels, saved as safetensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hed_condition, "BLOCKS", ((2, 4), (2, 6), (3, 8), (3, 8), (3, 8)))
        torch.manual_seed(5)
        path = tmp_path_factory.mktemp("hed") / "hed.safetensors"
        save_file(hed_condition.HedNetwork().state_dict(), path)
        yield path


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DPT for pictures of SIDE px."""
    path = tmp_path_factory.mktemp("dpt")
    save_tiny_depth(path, SIDE, patch=16, std=0.2, bias=0.2)
    return path


@pytest.fixture(scope="module")
def extractors(hed_file: Path, depth_folder: Path) -> Extractors:
    """By condition: ours, and the plain reading of one picture."""
    dpt = DPTForDepthEstimation.from_pretrained(depth_folder).eval().requires_grad_(False)
    return {
        "canny": (conditions.get("canny"), plain.canny),
        "hed": (conditions.get("hed", weights=hed_file), partial(plain.hed, load_file(hed_file))),
        "lineart": (conditions.get("lineart", sigma=2.0), partial(plain.lineart, sigma=2.0)),
        "depth": (conditions.get("depth", model=depth_folder), partial(plain.depth, dpt)),
    }


def control_maps(condition: str, batch: int) -> Tensor:
    """Maps of the condition's look; for depth and lineart, one is blank."""
    maps = pictures(batch, 11).mean(1, keepdim=True)
    if condition in ("canny", "lineart"):
        maps = ((maps - 0.55) * 8).clamp(0, 1)
    if condition in ("depth", "lineart"):
        maps[1] = 0
    return maps.expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("kind", ["attn", "conv"])
@torch.no_grad()
def test_taps(kind: TapKind) -> None:
    unet = tiny_unet()
    inputs = randn(2, 4, LATENT, LATENT), torch.tensor([3, 700]), randn(2, TEXT_LENGTH, 16)
    with Taps(unet, kind).record() as found:
        unet(*inputs)
    expected = plain.unet_with_taps(unet, kind, *inputs)[1]
    assert len(found) == len(expected) >= 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.std() > 0.01
        close(ours, theirs)


@pytest.mark.parametrize("kind", ["attn", "conv"])
@torch.no_grad()
def test_probe_reading(kind: TapKind) -> None:
    unet = tiny_unet()
    probe = probe_for(unet, kind)
    timesteps = torch.tensor([3, 700])
    _, taps = plain.unet_with_taps(unet, kind, randn(2, 4, LATENT, LATENT), timesteps, randn(2, TEXT_LENGTH, 16))
    embedding = unet.time_embedding(unet.time_proj(timesteps))
    expected = plain.aggregation_network(to_official(probe), GROUPS, taps, embedding, LATENT)
    assert expected.std() > 0.05
    close(probe(taps, embedding), expected)


@pytest.mark.parametrize("condition", ["canny", "hed", "lineart", "depth"])
def test_normalisers(condition: str) -> None:
    reading = randn(4, 3, 8, 8).tanh()
    found = normalise(reading, (-1.0, 1.0), NORMALISERS.get(condition, "identity"))
    expected = torch.stack([plain.normalised_reading(condition, one) for one in reading])
    close(found, expected)
    target, blank = control_target(control_maps(condition, 4), NORMALISERS.get(condition, "identity"))
    for ours, empty, one in zip(target, blank, control_maps(condition, 4), strict=True):
        theirs = plain.alignment_target(condition, one)
        assert bool(empty) == (theirs is None)
        if theirs is not None:
            close(ours.expand_as(theirs), theirs)


@pytest.mark.parametrize("limits", [(0, 200), (200, 200), (5, 920), (1, 129)])
def test_masked_means_with_inclusive_ends(limits: tuple[int, int]) -> None:
    values = randn(len(TIMESTEPS))
    inside = [limits[0] <= t <= limits[1] for t in TIMESTEPS]
    mask = in_range(torch.tensor(TIMESTEPS), limits)
    assert mask.tolist() == inside
    close(masked_mean(values, mask), plain.masked_mean(list(values), inside))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_estimate(prediction_type: str) -> None:
    bars = DDPMScheduler(**SCHEDULE).alphas_cumprod
    noisy, output = randn(len(TIMESTEPS), 4, 4, 4), randn(len(TIMESTEPS), 4, 4, 4, seed=1)
    found = predict_original(noisy, output, torch.tensor(TIMESTEPS), bars, prediction_type)
    for i, t in enumerate(TIMESTEPS):
        close(found[i], plain.one_step_estimate(noisy[i], output[i], float(bars[t]), prediction_type))


@pytest.mark.parametrize("condition", ["canny", "hed", "lineart", "depth"])
def test_reward_maps_and_their_gradient(condition: str, extractors: Extractors) -> None:
    ours, theirs = extractors[condition]
    pixels, weights = pictures(3, 7).requires_grad_(), randn(3, 1, SIDE, SIDE, seed=1)
    found = reward_extractor(ours)(pixels)
    expected = torch.stack([theirs(one) for one in pixels])
    if condition == "lineart":
        expected = 1 - expected  # ours are white on black, which is the same to a squared difference
    assert expected.std() > 0.005
    close(found, expected)
    found_gradient, gradient = (torch.autograd.grad((maps * weights).sum(), pixels)[0] for maps in (found, expected))
    assert gradient.abs().max() > 0.01
    close(found_gradient, gradient)


@dataclass
class Batch:
    """What one step of training sees, with the names of `training.tasks.frozen.Noised`."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    text: Tensor
    control: Tensor
    pixels: Tensor


def batch_of(condition: str, scheduler: DDPMScheduler) -> Batch:
    count = len(TIMESTEPS)
    latents, noise = randn(2, count, 4, LATENT, LATENT, seed=SEED)
    timesteps = torch.tensor(TIMESTEPS)
    return Batch(
        latents=latents,
        noise=noise,
        noisy=scheduler.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        text=randn(count, TEXT_LENGTH, 16, seed=10),
        control=control_maps(condition, count),
        pixels=pictures(count, 12),
    )


def plain_case(
    networks: Networks, scheduler: DDPMScheduler, extractor: Callable[[Tensor], Tensor], batch: Batch
) -> plain.Case:
    return plain.Case(
        condition=networks.condition,
        unet=networks.unet,
        controlnet=networks.controlnet,
        vae=networks.vae,
        probe_state=to_official(networks.probe),
        probe_groups=GROUPS,
        tap_kind=networks.kind,
        extractor=extractor,
        prediction_type=scheduler.config["prediction_type"],
        alphas_cumprod=scheduler.alphas_cumprod.tolist(),
        latents=batch.latents,
        noise=batch.noise,
        noisy=batch.noisy,
        timesteps=batch.timesteps.tolist(),
        text=batch.text,
        control=batch.control,
        pixels=batch.pixels,
        alpha=LOSS.alpha,
        reward_range=LOSS.reward_range,
        beta=LOSS.beta,
        alignment_range=LOSS.alignment_range,
    )


def composed_losses(networks: Networks, scheduler: DDPMScheduler, ours: Condition, batch: Batch) -> dict[str, Tensor]:
    """The losses as a training step composes them, from the sources' functions."""
    unet, vae, config = networks.unet, networks.vae, networks.probe.config
    down, mid = networks.controlnet(batch.noisy, batch.timesteps, batch.text, batch.control, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    with Taps(unet, networks.kind).record() as taps:
        output = unet(batch.noisy, batch.timesteps, batch.text, **residuals).sample
    diffusion = diffusion_loss(output, batch.noise, batch.latents, batch.timesteps, scheduler)
    kind = scheduler.config["prediction_type"]
    z0 = predict_original(batch.noisy, output, batch.timesteps, scheduler.alphas_cumprod, kind)
    extractor = reward_extractor(ours)
    target = extractor.target(batch.control, batch.pixels)

    def decode(latents: Tensor) -> Tensor:
        return (vae.decode(latents / vae.config["scaling_factor"]).sample / 2 + 0.5).clamp(0, 1)

    skip = extractor.blank(target)
    reward = reward_loss(z0, target, batch.timesteps, LOSS.reward_range, decode, extractor, skip)
    reading = networks.probe(taps, unet.time_embedding(unet.time_proj(batch.timesteps)))
    alignment = alignment_loss(
        reading, batch.control, batch.timesteps, LOSS.alignment_range, config.control_range, config.normaliser
    )
    total = diffusion + LOSS.alpha * reward + LOSS.beta * alignment
    return {"loss": total, "diffusion": diffusion, "reward": reward, "alignment": alignment}


def close_gradients(controlnet: ControlNetModel, loss: Tensor, expected: Tensor) -> None:
    """With respect to every parameter of the ControlNet, to 1e-5 of the largest."""
    names, parameters = zip(*controlnet.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(one, parameters, retain_graph=True) for one in (loss, expected))
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    assert largest > 1e-4
    for name, mine, wanted in zip(names, ours, theirs, strict=True):
        assert_close(mine, wanted, rtol=0, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")


@dataclass
class Setting:
    networks: Networks
    scheduler: DDPMScheduler
    condition: Condition
    batch: Batch
    expected: dict[str, Tensor]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def setting(request: pytest.FixtureRequest, extractors: Extractors) -> Setting:
    """One case, and what the plain reference makes of it."""
    name, kind, prediction_type = request.param
    condition, plain_extractor = extractors[name]
    networks = Networks(kind, name)
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **SCHEDULE)
    batch = batch_of(name, scheduler)
    expected = plain.losses(plain_case(networks, scheduler, plain_extractor, batch))
    return Setting(networks, scheduler, condition, batch, expected)


def test_whole_loss_and_controlnet_gradient(setting: Setting) -> None:
    found = composed_losses(setting.networks, setting.scheduler, setting.condition, setting.batch)
    for name, loss in setting.expected.items():
        assert loss > 1e-4, name
        close(found[name], loss)
        close_gradients(setting.networks.controlnet, found[name], loss)


def test_training_task(setting: Setting, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = setting.networks
    text_encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder")
    models = BaseModels(networks.unet, networks.vae, text_encoder, tiny_tokenizer(), setting.scheduler)
    task = ControlNetTask(networks.controlnet, models, LOSS, condition=setting.condition, probe=networks.probe)
    # Drawn timesteps would seldom lie inside and outside of both ranges and on their ends.
    monkeypatch.setattr("training.tasks.controlnet.noised", lambda *_: setting.batch)
    found = task({}, torch.Generator())
    for name, loss in setting.expected.items():
        close(found[name], loss)
    close_gradients(networks.controlnet, found["loss"], setting.expected["loss"])
