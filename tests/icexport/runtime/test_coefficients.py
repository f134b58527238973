"""A scheduler as numbers: the weights draw what diffusers' own step draws."""

from __future__ import annotations

import inspect
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from icexport.runtime.coefficients import Coefficients, NotLinearError, coefficients
from icexport.runtime.schedulers import scheduler_class

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""The noise schedule of Stable Diffusion 1.5, as its scheduler's config has it."""

V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {}),
    ("DDIM", V),
    ("DDIM", {"prediction_type": "sample"}),
    ("DDIM", ZERO_SNR),
    ("DDIMParallel", {}),
    ("DDIMInverse", {}),
    ("DDPM", {}),
    ("DDPM", ZERO_SNR),
    ("DDPMParallel", {}),
    ("PNDM", {}),
    ("PNDM", {"skip_prk_steps": True}),
    ("PNDM", V),
    ("LMSDiscrete", {}),
    ("LMSDiscrete", KARRAS),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", KARRAS),
    ("EulerDiscrete", {"use_exponential_sigmas": True}),
    ("EulerDiscrete", ZERO_SNR),
    ("EulerDiscrete", {"timestep_type": "continuous", **V}),
    ("EulerAncestralDiscrete", {}),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
    ("HeunDiscrete", {}),
    ("HeunDiscrete", KARRAS),
    ("KDPM2Discrete", {}),
    ("KDPM2AncestralDiscrete", {}),
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", KARRAS),
    ("DPMSolverMultistep", {"use_lu_lambdas": True}),
    ("DPMSolverMultistep", {"solver_order": 3, "algorithm_type": "dpmsolver++"}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistep", ZERO_SNR),
    ("DPMSolverMultistepInverse", {}),
    ("DPMSolverSinglestep", {"lower_order_final": True}),
    ("DEISMultistep", {}),
    ("UniPCMultistep", {}),
    ("UniPCMultistep", KARRAS),
    ("UniPCMultistep", {"solver_order": 3}),
    ("UniPCMultistep", ZERO_SNR),
    ("IPNDM", {}),
    ("EDMEuler", {}),
    ("EDMDPMSolverMultistep", {}),
    ("SASolver", {}),
    ("LCM", {}),
    ("TCD", {}),
    ("CogVideoXDDIM", {}),
]
"""Name and settings of what weights stand for."""

LEFT: list[tuple[str, dict[str, Any], str]] = [
    ("DDIM", {"clip_sample": True}, "is not linear"),
    ("DDPM", {"clip_sample": True}, "is not linear"),
    ("DDIM", {"thresholding": True}, "is not linear"),
    ("DPMSolverMultistep", {"thresholding": True}, "is not linear"),
    ("UniPCMultistep", {"thresholding": True}, "is not linear"),
    ("UniPCMultistep", {"solver_type": "bh1"}, "gives latents that are not finite"),
    ("CMStochasticIterative", {}, "is not linear"),
    ("CogVideoXDPM", {}, "cannot be tried"),
]
"""Name and settings of what is left to diffusers' loop, and why."""

NEEDS_TORCHSDE = {"DPMSolverSDE"}
"""Needs a library that diffusers does not bring."""


def make(name: str, settings: dict[str, Any]) -> Any:
    return scheduler_class(name).from_config({**SD15, **settings})


def model(sample: Tensor, timestep: float) -> Tensor:
    """Predict as a model might: from all of the input, not linearly, and otherwise at every timestep."""
    mixed: Tensor = sample * 0.7 + sample.roll(1, dims=-1) * 0.2
    predicted: Tensor = torch.tanh(mixed) + 0.1 * math.cos(timestep / 50)
    return predicted


def draw_with_diffusers(scheduler: Any, start: Tensor, **options: Any) -> Tensor:
    latents = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        predicted = model(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0]
    return latents


def draw(weights: Coefficients, start: Tensor, generator: torch.Generator) -> Tensor:
    shape = start.shape
    parts = [start, *(torch.randn(shape, generator=generator) for _ in range(weights.draws))]
    latents = start
    for call in range(weights.calls):
        given = torch.tensordot(weights.inputs[call, : len(parts)], torch.stack(parts), 1)
        parts.append(model(given, float(weights.timesteps[call])))
        latents = torch.tensordot(weights.latents[call, : len(parts)], torch.stack(parts), 1)
    return latents


def name_of(value: Any) -> str:
    return ",".join(map(str, value.values())) if isinstance(value, dict) else value


def difference(name: str, settings: dict[str, Any], steps: int, eta: float = 0.0) -> float:
    """Return the largest difference from what diffusers draws, relative to its largest latent."""
    scheduler = make(name, settings)
    weights = coefficients(scheduler, steps, eta=eta)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(2), "eta": eta}
    scheduler.set_timesteps(steps)
    expected = draw_with_diffusers(scheduler, start, **{k: v for k, v in options.items() if k in accepted})
    found = draw(weights, start, torch.Generator().manual_seed(2))
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("name", "settings"), TAKEN, ids=name_of)
def test_the_latents_are_those_of_diffusers(name: str, settings: dict[str, Any]) -> None:
    assert difference(name, settings, 20) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("name", ["DDIM", "UniPCMultistep", "DPMSolverMultistep", "EulerAncestralDiscrete", "TCD"])
def test_any_number_of_steps(name: str, steps: int) -> None:
    assert difference(name, {}, steps) <= 1e-5


def test_the_eta_of_ddim_draws_noise() -> None:
    assert coefficients(make("DDIM", {}), 20).draws == 0
    assert coefficients(make("DDIM", {}), 20, eta=0.7).draws == 20
    assert difference("DDIM", {}, 20, eta=0.7) <= 1e-5


def test_own_timesteps_and_sigmas() -> None:
    assert coefficients(make("LCM", {}), None, timesteps=[999, 499, 99]).timesteps.tolist() == [999, 499, 99]
    sigmas = [10.0, 3.0, 0.5, 0.1]
    scheduler = make("EulerDiscrete", {})
    found = coefficients(scheduler, None, sigmas=sigmas)
    scheduler.set_timesteps(sigmas=sigmas)
    assert torch.equal(found.timesteps, scheduler.timesteps.float())


@pytest.mark.parametrize("timesteps", [[99, 499, 999], [999, 999, 1]])
def test_timesteps_that_do_not_fall_are_left_to_diffusers_own_words(timesteps: list[int]) -> None:
    with pytest.raises(NotLinearError, match="DDPMScheduler cannot be tried: ValueError"):
        coefficients(make("DDPM", {}), None, timesteps=timesteps)


def test_the_scheduler_is_left_as_it_was_and_asked_once() -> None:
    scheduler = make("UniPCMultistep", {})
    before = pickle.dumps(scheduler)
    first = coefficients(scheduler, 7)
    assert pickle.dumps(scheduler) == before
    assert coefficients(make("UniPCMultistep", {}), 7) is first
    assert coefficients(make("UniPCMultistep", KARRAS), 7) is not first


@pytest.mark.parametrize("thing", [{1, 2}, {1: 0, "a": 0}, torch.zeros(2, dtype=torch.bfloat16)], ids=str)
def test_what_has_no_value_to_compare_is_derived_anew(thing: Any) -> None:
    scheduler = make("DDIM", {})
    scheduler.thing = thing
    first, second = coefficients(scheduler, 5), coefficients(scheduler, 5)
    assert first is not second
    assert torch.equal(first.latents, second.latents)


def test_what_was_set_by_hand_counts() -> None:
    scheduler, changed = make("DDIM", {}), make("DDIM", {})
    changed.alphas_cumprod = changed.alphas_cumprod**1.5
    assert not torch.equal(coefficients(scheduler, 5).latents, coefficients(changed, 5).latents)


class Crooked(DDIMScheduler):  # type: ignore[misc]
    """A subclass whose step is not linear."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Squash the latents."""
        (latents,) = super().step(*args, **kwargs)[:1]
        return (torch.tanh(latents),)


class Blurring(DDIMScheduler):  # type: ignore[misc]
    """A subclass whose step is linear and mixes neighbours."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Mix each place with its neighbour."""
        (latents,) = super().step(*args, **kwargs)[:1]
        return ((latents + latents.roll(1, dims=-1)) / 2,)


class Shifting(DDIMScheduler):  # type: ignore[misc]
    """A subclass whose step adds a constant."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Add a constant."""
        (latents,) = super().step(*args, **kwargs)[:1]
        return (latents + 0.01,)


class Rolling(DDIMScheduler):  # type: ignore[misc]
    """A subclass that draws noise that no generator of a call decides."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Add some noise."""
        (latents,) = super().step(*args, **kwargs)[:1]
        return (latents + 0.01 * torch.randn_like(latents),)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Crooked, "is not linear"),
        (Blurring, "is not linear"),
        (Shifting, "is not linear"),
        (Rolling, "draws noise that the generator of a call does not decide"),
    ],
)
def test_subclasses_are_tried_like_any_other(kind: type[DDIMScheduler], reason: str) -> None:
    with pytest.raises(NotLinearError, match=f"{kind.__name__} {reason}"):
        coefficients(kind.from_config(SD15), 10)


def test_no_weight_is_on_a_prediction_that_is_still_to_come() -> None:
    weights = coefficients(make("KDPM2AncestralDiscrete", {}), 6)
    for call in range(weights.calls):
        past = 1 + weights.draws + call
        assert not weights.inputs[call, past:].any()
        assert not weights.latents[call, past + 1 :].any()


def test_at_least_twenty_schedulers_are_taken() -> None:
    assert len({name for name, _ in TAKEN}) >= 20


def test_the_reference_names_every_scheduler_that_diffusers_pipelines_accept() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "schedulers.md"
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    taken = {scheduler_class(name).__name__ for name, _ in TAKEN}
    left = {scheduler_class(name).__name__ for name, *_ in LEFT} - taken
    needs = {scheduler_class(name).__name__ for name in NEEDS_TORCHSDE}
    assert rows == sorted([(n, "yes") for n in taken] + [(n, "no") for n in left] + [(n, "not tried") for n in needs])
    assert {name for name, _ in rows} >= {f"{kind.name}" for kind in KarrasDiffusionSchedulers}


@pytest.mark.parametrize(("name", "settings", "reason"), LEFT, ids=name_of)
def test_what_is_not_linear_is_left_with_the_reason(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotLinearError, match=f"{name}Scheduler {reason}"):
        coefficients(make(name, settings), 20)
