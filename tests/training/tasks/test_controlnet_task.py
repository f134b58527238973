"""The losses of ControlNet training, and that nothing but the ControlNet moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from torch.nn import functional as F

from icexport import conditions
from icexport.errors import UnsupportedOptionError, UsageError
from icexport.models.probe import InnerControlProbe
from tests.training.tiny_training import CANNY, networks, pictures, seeded
from training.tasks.controlnet import ControlNetTask
from training.tasks.frozen import BaseModels
from training.tasks.losses import LossConfig
from training.tasks.probe import ProbeTask, new_probe

Parts = tuple[BaseModels, ControlNetModel, InnerControlProbe]
EVERYWHERE = LossConfig(alpha=1, reward_range=(0, 999), beta=1, alignment_range=(0, 999))


@pytest.fixture
def parts(tiny_model: Path) -> Parts:
    return networks(tiny_model)


def task(parts: Parts, loss: LossConfig = EVERYWHERE, **options: Any) -> ControlNetTask:
    models, controlnet, probe = parts
    return ControlNetTask(controlnet, models, loss, **{"condition": CANNY, "probe": probe, **options})


def squares(models: BaseModels) -> dict[str, Any]:
    """Pictures with smooth control maps, which a reading of 8 x 8 can express."""
    batch = pictures(models)
    return batch | {"control": (batch["pixels"][:, :1] > 0.5).float().expand(-1, 3, -1, -1)}


def states(parts: Parts) -> dict[str, torch.Tensor]:
    models, _, probe = parts
    modules = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoder, "probe": probe}
    return {f"{n}.{k}": v.clone() for n, module in modules.items() for k, v in module.state_dict().items()}


def test_fifty_updates_reduce_the_alignment_and_leave_the_frozen_networks_bit_identical(parts: Parts) -> None:
    models, _, probe = parts
    batch = squares(models)
    reading = ProbeTask(probe, models, condition=CANNY)
    optimizer = torch.optim.AdamW(reading.parameters(), lr=1e-2)
    for step in range(60):  # a probe of random weights has no gradient worth following
        optimizer.zero_grad()
        reading(batch, seeded(step))["loss"].backward()
        optimizer.step()
    optimizer.zero_grad()
    aligned = task(parts, LossConfig(beta=10))
    before, alignments = states(parts), []
    optimizer = torch.optim.AdamW(aligned.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        losses = aligned(batch, seeded(3))
        losses["loss"].backward()
        optimizer.step()
        alignments.append(losses["alignment"].item())
    assert alignments[-1] < 0.8 * alignments[0]
    assert all(torch.equal(value, before[name]) for name, value in states(parts).items())
    frozen = (models.unet, models.vae, models.text_encoder, probe)
    assert all(p.grad is None and not p.requires_grad for module in frozen for p in module.parameters())


def test_the_loss_is_the_weighted_sum_and_only_the_controlnet_is_registered(parts: Parts) -> None:
    loss = LossConfig(alpha=0.5, reward_range=(0, 999), beta=3, alignment_range=(0, 999))
    found = task(parts, loss)
    losses = found(pictures(parts[0]), seeded())
    assert set(losses) == {"loss", "diffusion", "reward", "alignment"}
    total = losses["diffusion"] + 0.5 * losses["reward"] + 3 * losses["alignment"]
    assert torch.allclose(losses["loss"], total)
    assert min(value.item() for value in losses.values()) > 0
    assert all(name.startswith("controlnet.") for name in found.state_dict())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in found.parameters())


def test_losses_that_are_off_are_neither_computed_nor_reported(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = task(parts, LossConfig(), probe=None)
    monkeypatch.setattr(parts[0].vae, "decode", None)
    assert set(plain(pictures(parts[0]), seeded())) == {"loss", "diffusion"}


def test_the_same_draws_whatever_is_trained(parts: Parts) -> None:
    batch = pictures(parts[0])
    diffusion = [
        task(parts, loss, text_dropout=0)(batch, seeded())["diffusion"] for loss in (LossConfig(), EVERYWHERE)
    ]
    assert torch.equal(*diffusion)
    assert not torch.equal(diffusion[0], task(parts)(batch, seeded(1))["diffusion"])


def test_only_what_the_reward_counts_is_decoded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    models, batch = parts[0], pictures(parts[0])
    decoded: list[int] = []
    decode = models.decode

    def counting(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(models, "decode", counting)
    timesteps = sorted(_timesteps(parts, batch, seeded(5)))
    limits = (0, timesteps[1])
    masked = task(parts, LossConfig(alpha=1, reward_range=limits))(batch, seeded(5))
    assert decoded == [2]
    assert masked["reward"].item() == pytest.approx(_reward_of(parts, batch, limits), rel=1e-5)
    empty = task(parts, LossConfig(alpha=1, reward_range=(timesteps[1] + 1, timesteps[1] + 1)))(batch, seeded(5))
    assert decoded == [2]
    assert empty["reward"].item() == 0
    assert torch.equal(empty["loss"], masked["diffusion"])
    empty["loss"].backward()


def _timesteps(parts: Parts, batch: dict[str, Any], generator: torch.Generator) -> list[int]:
    from training.tasks.frozen import noised

    return noised(batch, parts[0], CANNY, generator, 0).timesteps.tolist()


def _reward_of(parts: Parts, batch: dict[str, Any], limits: tuple[int, int]) -> float:
    """The masked mean of the method, with every sample decoded."""
    from training.tasks.extractors import reward_extractor
    from training.tasks.frozen import noised, residuals

    models, controlnet, _ = parts
    sample = noised(batch, models, CANNY, seeded(5), 0)
    extract = reward_extractor(CANNY)
    with torch.no_grad():
        added = residuals(controlnet, sample, sample.control)
        output = models.unet(sample.noisy, sample.timesteps, sample.text, **added).sample
        signal = models.scheduler.alphas_cumprod[sample.timesteps].view(-1, 1, 1, 1)
        original = (sample.noisy - (1 - signal).sqrt() * output) / signal.sqrt()
        pixels = (models.vae.decode(original / models.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        errors = (extract(pixels) - extract.target(sample.control, batch["pixels"])).square().mean((1, 2, 3))
    mask = (sample.timesteps >= limits[0]) & (sample.timesteps <= limits[1])
    return (errors * mask).sum().item() / mask.sum().item()


def test_dropped_prompts_are_the_empty_prompt(parts: Parts) -> None:
    models, batch = parts[0], pictures(parts[0])
    empty = batch | {"input_ids": models.tokenize([""] * 4)}
    dropped = task(parts, LossConfig(), text_dropout=1.0)(batch, seeded())["diffusion"]
    kept = task(parts, LossConfig(), text_dropout=0.0)
    assert torch.equal(dropped, kept(empty, seeded())["diffusion"])
    assert not torch.equal(dropped, kept(batch, seeded())["diffusion"])


def test_velocity_prediction(tiny_model: Path) -> None:
    from training.tasks.frozen import noised, residuals

    parts = networks(tiny_model, "v_prediction")
    models, controlnet, _ = parts
    batch = pictures(models)
    loss = task(parts, LossConfig())(batch, seeded())["loss"].item()
    sample = noised(batch, models, CANNY, seeded(), 0)
    with torch.no_grad():
        output = models.unet(
            sample.noisy, sample.timesteps, sample.text, **residuals(controlnet, sample, sample.control)
        ).sample
    signal = models.scheduler.alphas_cumprod[sample.timesteps].view(-1, 1, 1, 1)
    velocity = signal.sqrt() * sample.noise - (1 - signal).sqrt() * sample.latents
    assert loss == pytest.approx(F.mse_loss(output, velocity).item(), rel=1e-5)


def test_ready_latents_and_control_maps_are_taken_as_they_are(parts: Parts) -> None:
    models, batch = parts[0], pictures(parts[0])
    latents = models.encode(batch["pixels"], None)
    ready = {"latents": latents, "control": CANNY.extract_batch(batch["pixels"]), "input_ids": batch["input_ids"]}
    found = task(parts, LossConfig(beta=1))
    losses = found(ready, seeded())
    assert torch.equal(losses["loss"], found({**batch, "latents": latents}, seeded())["loss"])
    other = {**ready, "control": 1 - ready["control"]}
    assert not torch.equal(losses["alignment"], found(other, seeded())["alignment"])


@pytest.mark.parametrize("normaliser", ["identity", "max", "minmax_inverted"])
def test_blank_control_maps_give_finite_gradients(parts: Parts, normaliser: str) -> None:
    models, controlnet, _ = parts
    probe = new_probe(models.unet, "attn", "canny", normaliser=normaliser)
    found = task((models, controlnet, probe))
    batch = {**pictures(models), "pixels": torch.ones(4, 3, 16, 16), "control": torch.zeros(4, 3, 16, 16)}
    losses = found(batch, seeded())
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in found.parameters() if p.grad is not None)


def test_half_precision_of_the_frozen_networks_under_autocast(tiny_model: Path, parts: Parts) -> None:
    batch = pictures(parts[0])
    exact = task(parts)(batch, seeded())
    models, controlnet, probe = networks(tiny_model)
    for module in (models.unet, models.vae, models.text_encoder):
        module.to(torch.bfloat16)
    half = task((models, controlnet, probe))
    with torch.autocast("cpu", torch.bfloat16):
        losses = half(batch, seeded())
    losses["loss"].backward()
    assert all(value.dtype == torch.float32 for value in losses.values())
    for name in ("diffusion", "alignment"):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())


def test_gradient_checkpointing_of_the_controlnet_changes_nothing(tiny_model: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        parts = networks(tiny_model)
        if checkpointing:
            parts[1].enable_gradient_checkpointing()
        found = task(parts)
        found(pictures(parts[0]), seeded())["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in found.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_of_the_unet_is_refused_with_taps(parts: Parts) -> None:
    parts[0].unet.enable_gradient_checkpointing()
    with pytest.raises(UnsupportedOptionError, match="gradient checkpointing"):
        task(parts)(pictures(parts[0]), seeded())


MISFITS: dict[str, Callable[[Parts], InnerControlProbe]] = {
    "taps of probe and unet differ: (32, 32, 16) and": lambda parts: new_probe(
        parts[0].unet, "conv", "canny", dims=(32, 32, 16)
    ),
    "condition of probe and ControlNet differ: depth": lambda parts: new_probe(parts[0].unet, "attn", "depth"),
    "time embedding of probe and unet differ: 7 and 64": lambda parts: new_probe(
        parts[0].unet, "attn", "canny", time_embed_dim=7
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_probe_that_does_not_fit_is_refused_before_training(parts: Parts, message: str) -> None:
    models, controlnet, _ = parts
    with pytest.raises(UsageError) as error:
        task((models, controlnet, MISFITS[message](parts)))
    assert message in str(error.value)


def test_alignment_without_a_probe_is_refused(parts: Parts) -> None:
    with pytest.raises(UsageError, match="give one"):
        task(parts, probe=None)


def test_a_run_goes_on_only_with_the_same_losses_condition_and_networks(parts: Parts) -> None:
    settings = task(parts).settings()
    assert task(parts).settings() == settings
    assert task(parts, LossConfig(beta=1)).settings() != settings
    assert task(parts, condition=conditions.get("canny", low_threshold=10)).settings() != settings
    with torch.no_grad():
        parts[0].unet.conv_in.weight[0] += 1
    assert task(parts).settings()["frozen"]["unet"] != settings["frozen"]["unet"]


def test_save_writes_a_diffusers_folder_without_paths_of_this_machine(parts: Parts, tmp_path: Path) -> None:
    found = task(parts)
    found.save(tmp_path)
    loaded = ControlNetModel.from_pretrained(tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in found.controlnet.state_dict().items())
    assert "tiny-model" not in (tmp_path / "config.json").read_text()
