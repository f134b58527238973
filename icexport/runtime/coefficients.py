"""A scheduler as numbers: what the latents of a picture are made of after each call of the model.

Nearly all schedulers of diffusers are linear. Whatever they keep and combine, the latents after a call are a weighted
sum of the start noise, of the noise drawn on the way, and of the predictions so far. The weights are found by letting
the scheduler itself work on unit vectors, so that no scheduler is written a second time. Pictures of any scheduler and
number of steps are then drawn by the same few operations, side by side.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.controlnet.pipeline_controlnet import retrieve_timesteps
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from icexport.errors import UnsupportedOptionError

_TOLERANCE = 2e-6
"""Largest difference from the scheduler's own latents, relative to their largest value. Some schedulers round to
float32 on the way, which makes up to 5e-7; those that clip differ by a hundredth and more."""

_SHAPE = (1, 4, 8, 8)
"""Latents that the weights are tried on: with neighbours and channels, which a linear scheduler does not mix."""

_RANDOM = frozenset(
    {
        torch.randn,
        torch.randn_like,
        torch.rand,
        torch.rand_like,
        torch.randint,
        torch.randint_like,
        torch.randperm,
        torch.normal,
        torch.bernoulli,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.bernoulli_,
    }
)


class NotLinearError(UnsupportedOptionError):
    """A scheduler that weights cannot stand for; the message says why."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What the latents are made of, for one scheduler and its K calls of the model.

    A picture has M = 1 + N + K *parts* of the latents' shape, in this order: the start noise, the N noises that the
    scheduler draws on the way, and the K predictions as they come. Row k of the weights needs no later prediction than
    the k-th.

    Attributes:
        timesteps: timestep of each call, ``[K]`` float32.
        inputs: how much of each part is in what the model is given at call k, ``[K,M]`` float32.
        latents: how much of each part is in the latents after call k, ``[K,M]`` float32.
    """

    timesteps: Tensor
    inputs: Tensor
    latents: Tensor

    @property
    def calls(self) -> int:
        """How often the model is called, K; some schedulers call it more than once a step."""
        return len(self.timesteps)

    @property
    def draws(self) -> int:
        """How many noises are drawn on the way, N."""
        return self.latents.shape[1] - 1 - self.calls


def coefficients(
    scheduler: SchedulerMixin,
    steps: int | None,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> Coefficients:
    """Return the weights that stand for a scheduler; it is not changed, and equal questions are answered once.

    Args:
        scheduler: any scheduler of diffusers, in any state.
        steps: number of steps; None with own timesteps or sigmas.
        timesteps: own timesteps instead, for schedulers that take them.
        sigmas: own sigmas instead, for schedulers that take them.
        eta: eta of DDIM, for schedulers that take it.

    Raises:
        NotLinearError: the scheduler is not linear, draws its noise otherwise than diffusers' ``randn_tensor``, or
            does not take these arguments.
    """
    try:
        state = _state(vars(scheduler))
        hash(state)
    except TypeError:  # something in the scheduler has no value to compare: it is derived anew every time
        state = object()
    question = _Question(
        type(scheduler),
        state,
        steps,
        None if timesteps is None else tuple(timesteps),
        None if sigmas is None else tuple(sigmas),
        eta,
        scheduler,
    )
    found = _known(question)
    if isinstance(found, str):
        raise NotLinearError(f"{type(scheduler).__name__} {found}")
    return found


@dataclass(frozen=True)
class _Question:
    kind: type[SchedulerMixin]
    state: Hashable
    steps: int | None
    timesteps: tuple[int, ...] | None
    sigmas: tuple[float, ...] | None
    eta: float
    scheduler: SchedulerMixin = field(compare=False)


def _state(value: Any) -> Hashable:
    """Return what a scheduler holds, by value."""
    if isinstance(value, Tensor):
        value = value.numpy(force=True)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return tuple((name, _state(value[name])) for name in sorted(value))
    return tuple(map(_state, value)) if isinstance(value, list | tuple) else value


def _derive(question: _Question) -> Coefficients | str:
    """Return the weights, or why there are none."""
    generator = torch.Generator().manual_seed(0)

    def random(kept: list[Tensor]) -> Callable[[int], Tensor]:
        def make(_index: int) -> Tensor:
            kept.append(torch.randn(_SHAPE, generator=generator, dtype=torch.float64))
            return kept[-1]

        return make

    start: list[Tensor] = []
    noises: list[Tensor] = []
    predictions: list[Tensor] = []
    try:
        tried = _run(question, random(start), random(noises), random(predictions))
        before = 1 + len(noises)
        unit = _unit_vectors(before + len(predictions))
        units = _run(question, unit, lambda index: unit(1 + index), lambda index: unit(before + index))
    except _RefusedError as refused:
        return str(refused)
    except Exception as error:  # noqa: BLE001  of code that is not ours; diffusers' own loop shows it to the user
        return f"cannot be tried: {type(error).__name__}: {' '.join(str(error).split())}"
    parts = torch.cat([*start, *noises, *predictions]).flatten(1)
    inputs, latents = units.inputs, units.latents
    if not all(rows.isfinite().all() for rows in (inputs, latents, tried.inputs, tried.latents)):
        return "gives latents that are not finite"
    for weights, own in ((inputs, tried.inputs), (latents, tried.latents)):
        if not torch.allclose(weights @ parts, own, rtol=0, atol=_TOLERANCE * own.abs().max().item()):
            return "is not linear in its latents, predictions and noise, which it may be without clipping"
    return Coefficients(tried.timesteps, inputs.float(), latents.float())


_known = functools.lru_cache(maxsize=64)(_derive)


def _unit_vectors(count: int) -> Callable[[int], Tensor]:
    # Four axes, for some schedulers count on them.
    return lambda index: torch.eye(count, dtype=torch.float64)[index].reshape(1, count, 1, 1)


@dataclass(frozen=True)
class _Trace:
    """One run of a scheduler without a model: what that would be given, and what latents become, call by call."""

    timesteps: Tensor
    inputs: Tensor
    latents: Tensor


def _run(
    question: _Question,
    start: Callable[[int], Tensor],
    noise: Callable[[int], Tensor],
    prediction: Callable[[int], Tensor],
) -> _Trace:
    scheduler = copy.deepcopy(question.scheduler)
    own = (question.timesteps, question.sigmas)
    timesteps, _ = retrieve_timesteps(scheduler, question.steps, "cpu", *(values and list(values) for values in own))
    drawn = _Noise(noise)
    offered = {"eta": question.eta, "generator": drawn.generator}
    accepted = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in offered.items() if name in accepted}
    latents = start(0) * scheduler.init_noise_sigma
    inputs, results = [], []
    for index, timestep in enumerate(timesteps):
        inputs.append(scheduler.scale_model_input(latents, timestep))
        predicted = prediction(index)
        with drawn:
            latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0]
        results.append(latents)
    rows = (torch.stack(tensors).double().flatten(1) for tensors in (inputs, results))
    return _Trace(timesteps.float(), *rows)


class _RefusedError(Exception):
    """Why weights cannot stand for a scheduler."""


class _Noise(TorchFunctionMode):
    """Gives a scheduler noise of ours for what it draws, in this thread.

    Args:
        make: returns the noise of an index, 0 for the first that is drawn.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self._make = make
        self._count = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call what torch was to call, if it draws no noise."""
        kwargs = kwargs or {}
        if function not in _RANDOM:
            return function(*args, **kwargs)
        if function is not torch.randn or kwargs.get("generator") is not self.generator:
            raise _RefusedError("draws noise that the generator of a call does not decide")
        self._count += 1
        return self._make(self._count - 1)
