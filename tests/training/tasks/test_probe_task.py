"""Probe training, the sizes of new probes, and the leak test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch.nn import functional as F

from icexport.errors import UsageError
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.taps import Taps
from tests.training.tiny_training import CANNY, networks, pictures, seeded
from training.tasks import leak
from training.tasks.frozen import BaseModels, noised, probe_target, read, residuals
from training.tasks.leak import leak_test
from training.tasks.probe import ProbeTask, new_probe

Parts = tuple[BaseModels, ControlNetModel, InnerControlProbe]


@pytest.fixture
def parts(tiny_model: Path) -> Parts:
    return networks(tiny_model)


def task(parts: Parts, probe: InnerControlProbe | None = None, **options: Any) -> ProbeTask:
    models, controlnet, own = parts
    return ProbeTask(probe or own, models, **{"condition": CANNY, "controlnet": controlnet, **options})


@pytest.mark.parametrize(("kind", "weights"), [("attn", 5_907_436), ("conv", 8_484_751)])
def test_new_probes_for_stable_diffusion_have_the_official_sizes(kind: Any, weights: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        probe = new_probe(unet, kind, "hed")
    assert sum(p.numel() for p in probe.parameters()) == weights
    assert (probe.config.projection_dim, probe.config.num_groups, probe.config.head_dims) == (384, 32, (128, 32))
    assert (probe.config.tap_kind, probe.config.normaliser, probe.config.condition) == (kind, "identity", "hed")


def test_new_probes_for_small_networks_are_small_and_take_other_sizes(parts: Parts) -> None:
    unet = parts[0].unet
    config = new_probe(unet, "conv", "depth").config
    assert (config.projection_dim, config.num_groups, config.head_dims) == (32, 4, (10, 2))
    assert (config.dims, config.normaliser) == (Taps(unet, "conv").dims, "max")
    assert new_probe(unet, projection_dim=64, output_scale=2).config.num_groups == 8
    with pytest.raises(UsageError, match="projection_dim"):
        new_probe(unet, projection_dim=10)


def test_the_loss_is_that_of_every_sample_at_its_own_timestep(parts: Parts) -> None:
    models, controlnet, probe = parts
    batch = pictures(models)
    losses = task(parts, control_share=1.0)(batch, seeded())
    generator = seeded()
    torch.rand((), generator=generator)  # whether the ControlNet is attached
    sample = noised(batch, models, CANNY, generator, 0)
    expected = {}
    with torch.no_grad():
        for i, timestep in enumerate(sample.timesteps.tolist()):
            one = {name: value[i : i + 1] for name, value in vars(sample).items()}
            alone = type(sample)(**one)
            with Taps(models.unet).record() as taps:
                models.unet(alone.noisy, timestep, alone.text, **residuals(controlnet, alone, alone.control))
            reading = probe(taps, models.unet.time_embedding(models.unet.time_proj(torch.tensor([timestep]))))
            error = F.mse_loss(reading, 2 * F.adaptive_avg_pool2d(alone.control, 8) - 1).item()
            expected.setdefault(f"t{timestep // 100 * 100:03d}-{timestep // 100 * 100 + 99:03d}", []).append(error)
    means = {name: sum(errors) / len(errors) for name, errors in expected.items()}
    everything = [error for errors in expected.values() for error in errors]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"loss": sum(everything) / 4, **means}, rel=1e-4
    )


def test_the_controlnet_runs_in_its_share_of_the_batches(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("training.tasks.probe.residuals", lambda *_: calls.append(1) or {})
    batch = pictures(parts[0], 1)
    for share, low, high in ((0.0, 0, 0), (0.5, 2, 10), (1.0, 12, 12)):
        calls.clear()
        found = task(parts, control_share=share)
        for seed in range(12):
            found(batch, seeded(seed))
        assert low <= len(calls) <= high
    calls.clear()
    task(parts, controlnet=None, control_share=1.0)(batch, seeded())
    assert not calls


def test_only_the_probe_gets_gradients(parts: Parts) -> None:
    found = task(parts, control_share=1.0)
    found(pictures(parts[0]), seeded())["loss"].backward()
    assert all(name.startswith("probe.") for name in found.state_dict())
    assert all(p.grad is not None for p in found.parameters())
    assert all(p.grad is None for module in (parts[0].unet, parts[1]) for p in module.parameters())


def test_the_balanced_loss_weighs_background_and_lines_alike(parts: Parts) -> None:
    models, batch = parts[0], pictures(parts[0])
    control = torch.zeros(4, 3, 16, 16)
    control[:, :, :2] = 1  # one of eight rows of the reading
    batch = batch | {"control": control}
    plain, balanced = (task(parts, controlnet=None, balanced=b)(batch, seeded())["loss"].item() for b in (False, True))
    generator = seeded()
    torch.rand((), generator=generator)
    sample = noised(batch, models, CANNY, generator, 0)
    with torch.no_grad(), Taps(models.unet).record() as taps:
        models.unet(sample.noisy, sample.timesteps, sample.text)
    errors = (read(parts[2], models, taps, sample.timesteps) - probe_target(parts[2], control, (8, 8))).square()
    lines, empty = errors[:, :, :1].mean().item(), errors[:, :, 1:].mean().item()
    assert plain == pytest.approx((lines + 7 * empty) / 8, rel=1e-4)
    assert balanced == pytest.approx((lines + empty) / 2, rel=1e-4)


def test_the_embedding_follows_the_probes_convention(parts: Parts) -> None:
    models, timesteps = parts[0], torch.tensor([100, 700])
    taps = [torch.zeros(2, dim, 8, 8) for dim in Taps(models.unet).dims]
    seen: list[torch.Tensor] = []

    def embedding(**options: Any) -> torch.Tensor | None:
        probe = new_probe(models.unet, **options)
        probe.forward = lambda _taps, given: seen.append(given) or torch.zeros(1)  # type: ignore[method-assign]
        read(probe, models, taps, timesteps)
        return seen.pop()

    expected = models.unet.time_embedding(models.unet.time_proj(timesteps))
    assert torch.equal(embedding(), expected)
    mirrored = models.unet.time_embedding(models.unet.time_proj(1000 - timesteps))
    assert torch.equal(embedding(timestep_convention="mirrored"), mirrored)
    assert embedding(timestep_convention="none", time_embed_dim=None) is None


def test_the_target_is_in_the_probes_range_and_channels() -> None:
    control = torch.zeros(1, 3, 4, 4)
    control[..., :2] = 1
    config = {"dims": (32,), "projection_dim": 32, "num_groups": 4, "time_embed_dim": None}
    one = InnerControlProbe(ProbeConfig(out_channels=1, control_range=(-0.5, 0.5), **config))
    assert probe_target(one, control, (1, 4)).tolist() == [[[[0.5, 0.5, -0.5, -0.5]]]]
    three = InnerControlProbe(ProbeConfig(**config))
    assert probe_target(three, control, (2, 2))[0, 2].tolist() == [[1, -1], [1, -1]]
    assert probe_target(three, control, (1, 1)).eq(0).all()


class _Reader(torch.nn.Module):
    """In place of a probe: gives back what the test says."""

    def __init__(self, config: ProbeConfig, readings: list[torch.Tensor]) -> None:
        super().__init__()
        self.config, self._readings = config, readings

    def forward(self, _taps: Any, _embedding: Any) -> torch.Tensor:
        return 2 * self._readings.pop(0) - 1


@pytest.mark.parametrize("reads", ["picture", "control"])
def test_the_leak_test_tells_what_a_probe_reads(parts: Parts, reads: str) -> None:
    models, controlnet, probe = parts
    batch = pictures(models)
    maps = CANNY.extract_batch(batch["pixels"])
    own, foreign = (F.adaptive_avg_pool2d(m, 8) for m in (maps, maps.roll(1, 0)))
    reader: Any = _Reader(probe.config, [own, own, own if reads == "picture" else foreign] * 2)
    rows = leak_test(reader, models, controlnet, [batch], condition=CANNY, timesteps=(10, 900))
    chance = F.mse_loss(own, foreign).item()
    assert chance > 0
    for timestep, row in zip((10, 900), rows, strict=True):
        wrong = chance if reads == "picture" else 0.0
        expected = {"plain": 0, "matched": 0, "to_picture": chance - wrong, "to_control": wrong, "chance": chance}
        assert row == pytest.approx({"timestep": timestep, **expected}, abs=1e-6)


def test_the_leak_test_averages_over_pictures_and_repeats_itself(parts: Parts) -> None:
    models, controlnet, probe = parts
    batch = pictures(models)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(2), slice(2, 4))]
    rows = [leak_test(probe, models, controlnet, halves, condition=CANNY, timesteps=(500,)) for _ in range(2)]
    assert rows[0] == rows[1]
    single = leak_test(probe, models, None, halves, condition=CANNY, timesteps=(500,))
    assert set(single[0]) == {"timestep", "plain"}
    assert single[0]["plain"] == rows[0][0]["plain"]
    assert leak.TIMESTEPS[-1] == models.steps - 1


def test_the_leak_test_feeds_every_picture_its_own_map_and_that_of_another(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, controlnet, probe = parts
    batch, controls = pictures(models), []
    monkeypatch.setattr(leak, "residuals", lambda _network, _sample, control: controls.append(control) or {})
    leak_test(probe, models, controlnet, [batch], condition=CANNY, timesteps=(500,))
    maps = CANNY.extract_batch(batch["pixels"])
    assert [torch.equal(*pair) for pair in zip(controls, (maps, maps[[3, 0, 1, 2]]), strict=True)] == [True, True]


def test_the_leak_test_needs_two_pictures(parts: Parts) -> None:
    models, controlnet, probe = parts
    with pytest.raises(UsageError, match="two pictures"):
        leak_test(probe, models, controlnet, [pictures(models, 1)], condition=CANNY)
