from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from icexport.errors import UsageError
from icexport.fidelity.normalise import control_target, normalise
from training.tasks.losses import (
    LossConfig,
    alignment_loss,
    balanced_mse,
    diffusion_loss,
    in_range,
    masked_mean,
    predict_original,
    reward_loss,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
    )


def test_ranges_include_both_ends() -> None:
    assert in_range(torch.tensor([4, 5, 6, 10, 11]), (5, 10)).tolist() == [False, True, True, True, False]


def test_masked_mean_ignores_what_is_masked_out() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0, torch.inf], requires_grad=True)
    found = masked_mean(values, torch.tensor([True, False, True, False]))
    found.backward()
    assert found == 2
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.tensor([torch.nan, 2.0], requires_grad=True)
    found = masked_mean(values, torch.tensor([False, False]))
    found.backward()
    assert found == 0
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_estimate_is_the_schedulers(prediction_type: str) -> None:
    ddpm, timesteps = scheduler(prediction_type), torch.tensor([0, 1, 200, 500, 999])
    noisy, output = randn(5, 4, 6, 6), randn(5, 4, 6, 6, seed=1)
    found = predict_original(noisy, output, timesteps, ddpm.alphas_cumprod, prediction_type)
    for i, t in enumerate(timesteps.tolist()):
        expected = ddpm.step(output[i : i + 1], t, noisy[i : i + 1]).pred_original_sample
        assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_prediction(prediction_type: str) -> None:
    """Its diffusion loss is 0, and its one-step estimate is the clean latents."""
    ddpm, timesteps = scheduler(prediction_type), torch.tensor([10, 400, 900])
    latents, noise = randn(3, 4, 6, 6), randn(3, 4, 6, 6, seed=1)
    noisy = ddpm.add_noise(latents, noise, timesteps)
    output = noise if prediction_type == "epsilon" else ddpm.get_velocity(latents, noise, timesteps)
    assert diffusion_loss(output, noise, latents, timesteps, ddpm) == 0
    assert_close(diffusion_loss(output + 2, noise, latents, timesteps, ddpm), torch.tensor(4.0))
    found = predict_original(noisy, output, timesteps, ddpm.alphas_cumprod, prediction_type)
    assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_losses_of_half_precision_are_float32() -> None:
    ddpm, timesteps, latents = scheduler("epsilon"), torch.tensor([3, 500]), randn(2, 4, 6, 6)
    noise = randn(2, 4, 6, 6, seed=1)
    output = (noise + 0.1).bfloat16()
    loss = diffusion_loss(output, noise, latents, timesteps, ddpm)
    assert loss.dtype == torch.float32
    assert_close(loss, torch.nn.functional.mse_loss(output.float(), noise))
    found = predict_original(latents.bfloat16(), output, timesteps, ddpm.alphas_cumprod, "epsilon")
    assert found.dtype == torch.float32


def test_unknown_prediction_type_is_refused() -> None:
    x, timesteps = randn(1, 4, 2, 2), torch.tensor([1])
    with pytest.raises(UsageError, match="'flow'; expected epsilon, v_prediction or sample"):
        predict_original(x, x, timesteps, torch.ones(5), "flow")
    ddpm = scheduler("epsilon")
    ddpm.register_to_config(prediction_type="flow")
    with pytest.raises(UsageError, match="'flow'"):
        diffusion_loss(x, x, x, timesteps, ddpm)


@pytest.fixture(scope="module")
def decode() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).requires_grad_(False)
    return lambda latents: (4 * vae.eval().decode(latents).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("limits", [(0, 200), (0, 999), (200, 200)])
def test_decoding_the_masked_subset_changes_nothing(
    limits: tuple[int, int], decode: Callable[[Tensor], Tensor]
) -> None:
    timesteps, target = torch.tensor([500, 0, 200, 201, 130, 999]), randn(6, 1, 16, 16).sigmoid()
    decoded = []

    def extract(pixels: Tensor) -> Tensor:
        return pixels.square().mean(1, keepdim=True)

    def counting_decode(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return decode(latents)

    z0 = randn(6, 4, 8, 8).requires_grad_()
    found = reward_loss(z0, target, timesteps, limits, counting_decode, extract)
    full = masked_mean((extract(decode(z0)) - target).square().mean((1, 2, 3)), in_range(timesteps, limits))
    assert decoded == [int(in_range(timesteps, limits).sum())]
    assert found > 0.01
    assert_close(found, full, rtol=0, atol=1e-6)
    gradient, expected = (torch.autograd.grad(loss, z0)[0] for loss in (found, full))
    assert expected.abs().max() > 1e-5
    assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def never(_: Tensor) -> Tensor:
    raise AssertionError("called for no sample")


def test_reward_of_no_sample_is_a_zero_that_can_be_added() -> None:
    z0 = torch.full((2, 4, 2, 2), torch.nan, requires_grad=True)
    found = reward_loss(z0, torch.zeros(2, 1, 4, 4), torch.tensor([201, 999]), (0, 200), never, never)
    weight = torch.ones((), requires_grad=True)
    (weight.square() + 0.5 * found).backward()
    assert found == 0
    assert weight.grad == 2


def test_reward_skips_samples() -> None:
    z0, target, timesteps = randn(3, 1, 4, 4), torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 2])
    skip = torch.tensor([False, True, False])
    found = reward_loss(z0, target, timesteps, (0, 1), lambda z: z, lambda x: x, skip)
    assert_close(found, z0[0].square().mean())
    assert reward_loss(z0, target, timesteps, (1, 1), never, never, skip) == 0


def test_alignment_of_a_perfect_reading_is_zero() -> None:
    control = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 920])
    for low, high in ((-1.0, 1.0), (-0.5, 0.5)):
        reading = low + (high - low) * control
        loss = alignment_loss(reading, control, timesteps, (0, 920), (low, high), "identity")
        assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-10)


def test_lineart_probes_read_white_lines_as_the_control_map_shows_them() -> None:
    """Normalising inverts the reading, so the control map is inverted too."""
    control = torch.zeros(1, 3, 8, 8)
    control[..., 3] = 1
    timesteps = torch.zeros(1, dtype=torch.long)
    same = alignment_loss(0.5 * control - 0.2, control, timesteps, (0, 920), (-1.0, 1.0), "minmax_inverted")
    inverted = alignment_loss(0.2 - 0.5 * control, control, timesteps, (0, 920), (-1.0, 1.0), "minmax_inverted")
    assert_close(same, torch.tensor(0.0), rtol=0, atol=1e-10)
    assert_close(inverted, torch.tensor(1.0))


def test_alignment_counts_samples_inside_the_range_at_their_own_size() -> None:
    reading = torch.zeros(3, 3, 4, 4)  # 0.5 on the scale of the control map
    control = torch.tensor([0.5, 1.0, 0.0])[:, None, None, None].expand(3, 3, 16, 16)
    loss = alignment_loss(reading, control, torch.tensor([920, 0, 921]), (0, 920), (-1.0, 1.0), "identity")
    assert_close(loss, torch.tensor(0.125))
    assert alignment_loss(reading, control, torch.tensor([921, 999, 930]), (0, 920), (-1.0, 1.0), "identity") == 0


@pytest.mark.parametrize("normaliser", ["max", "minmax_inverted"])
def test_blank_control_maps_do_not_count(normaliser: str) -> None:
    reading = randn(2, 3, 4, 4).tanh().requires_grad_()
    control = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = alignment_loss(reading[:1], control[:1], torch.tensor([5]), (0, 9), (-1.0, 1.0), normaliser)
    control[1] = 0
    both = alignment_loss(reading, control, torch.tensor([5, 5]), (0, 9), (-1.0, 1.0), normaliser)
    assert alone > 0.01
    assert_close(both, alone)
    both.backward()
    assert reading.grad is not None
    assert reading.grad[0].any()
    assert not reading.grad[1].any()


@pytest.mark.parametrize("normaliser", ["identity", "max", "minmax_inverted"])
@pytest.mark.parametrize("level", [-1.0, 0.3, 1.0])
def test_blank_readings_keep_gradients_finite(normaliser: str, level: float) -> None:
    reading = torch.full((1, 3, 4, 4), level, requires_grad=True)
    control = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = alignment_loss(reading, control, torch.tensor([5]), (0, 9), (-1.0, 1.0), normaliser)
    loss.backward()
    assert loss.isfinite()
    assert reading.grad is not None
    assert reading.grad.isfinite().all()


@pytest.mark.parametrize("normaliser", ["identity", "max", "minmax_inverted"])
def test_normaliser_is_differentiable(normaliser: str) -> None:
    """Against finite differences; the result is float32, which limits them."""
    reading, direction = 0.8 * randn(1, 3, 4, 4).tanh(), randn(1, 3, 4, 4, seed=1)
    weights = randn(1, 3, 4, 4, seed=2)

    def value(step: Tensor) -> Tensor:
        return (normalise(reading + step * direction, (-1.0, 1.0), normaliser) * weights).sum()

    step = torch.zeros((), requires_grad=True)
    value(step).backward()
    size = torch.tensor(1e-2)
    assert step.grad is not None
    assert_close(step.grad, (value(size) - value(-size)) / (2 * size), rtol=1e-2, atol=1e-2)


def test_control_targets() -> None:
    control = torch.stack((torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2), torch.full((3, 2, 2), 1e-7)))
    control[0, :, 0, 0] = 0.25
    for normaliser, corner, blank in (
        ("identity", 0.25, [False] * 3),
        ("max", 0.5, [False, True, True]),
        ("minmax_inverted", 0.75, [False, True, True]),
    ):
        target, found = control_target(control, normaliser)
        assert target[0, 0, 0, 0] == corner
        assert found.tolist() == blank
        assert target.isfinite().all()


def test_balanced_mse_weighs_background_and_drawing_alike() -> None:
    target = torch.full((1, 1, 4, 4), -1.0)
    target[..., 0, 0] = 1
    reading = torch.full_like(target, -1)
    assert balanced_mse(reading, target, -1.0) == 2
    assert balanced_mse(reading, torch.full_like(target, -1), -1.0) == 0
    assert balanced_mse(reading, torch.full_like(target, 0.0), -1.0) == 0.5


def test_config_lists_every_fault() -> None:
    published = LossConfig()
    assert (published.reward_range, published.alignment_range) == ((0, 200), (0, 920))
    assert (published.alpha, published.beta, published.legacy_hed) == (0, 0, False)
    assert LossConfig(reward_range=[0, 5]).reward_range == (0, 5)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        LossConfig(
            alpha=-1,
            beta=float("nan"),
            reward_range=(5, 0),
            alignment_range=(0.5, 3),  # type: ignore[arg-type]
            legacy_hed="no",  # type: ignore[arg-type]
        )
    for name in ("alpha", "beta", "reward_range", "alignment_range", "legacy_hed"):
        assert f"\n  {name}: got " in str(caught.value)
