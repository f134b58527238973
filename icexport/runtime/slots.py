"""A picture between two calls of the model: all of its state, and nothing of any other picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from icexport.fidelity.monitor import FidelityMonitor
from icexport.runtime.coefficients import Coefficients

_numbers = itertools.count()

_FLOAT32 = 4


@dataclass(frozen=True, eq=False)
class StepRequest:
    """A picture to draw: everything that is known before its first step.

    Attributes:
        coefficients: its scheduler and steps.
        noise: start noise, then the noise that the scheduler draws on the way, ``[1+N,C,h,w]`` in any float dtype.
        prompt_embeds: ``[1,S,D]``, or with guidance ``[2,S,D]``: the unconditional prompt, then the prompt.
        control_map: ``[3,H,W]`` in [0,1].
        scales: strength of the control at each of the K calls; 0 runs no ControlNet.
        guidance_scale: weight of the prompt against the unconditional one; counts with two prompts only.
        guidance_rescale: share of the prediction that is scaled to the deviation of the conditional one, 0 to 1
            (arXiv 2305.08891, section 3.4).
        guess_mode: whether the control is weaker in shallow layers, and absent in the unconditional prediction.
        monitor: reads the control back at the calls that it wants; for one picture. None: nothing is read.
    """

    coefficients: Coefficients
    noise: Tensor
    prompt_embeds: Tensor
    control_map: Tensor
    scales: Sequence[float]
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guess_mode: bool = False
    monitor: FidelityMonitor | None = None

    @property
    def rows(self) -> int:
        """How many samples of a call it takes: two with guidance."""
        return len(self.prompt_embeds)

    @property
    def state_bytes(self) -> int:
        """Bytes of what it holds between calls, beside the request itself."""
        parts = 1 + self.coefficients.draws + self.coefficients.calls
        return _FLOAT32 * parts * self.noise[0].numel()


class NotFiniteError(ArithmeticError):
    """A picture whose latents became NaN or infinite.

    Attributes:
        latents: they, ``[1,C,h,w]``.
    """

    def __init__(self, latents: Tensor) -> None:
        super().__init__("The latents of this picture hold NaN or infinite values.")
        self.latents = latents


class Slot:
    """The state of one picture.

    Args:
        request: the picture.
        device: where its latents lie.

    Attributes:
        number: no other slot ever has it.
        request: the picture.
        ticket: gets its latents.
        call: number of the model's next call, 0 to K; K: it is done.
        turn: when its last call was, as the engine counts them; 0: it had none yet.
    """

    def __init__(self, request: StepRequest, device: torch.device) -> None:
        self.number = next(_numbers)
        self.request = request
        self.ticket: Future[Tensor] = Future()
        self.call = self.turn = 0
        weights = request.coefficients
        self._shape = request.noise.shape[1:]
        self._parts = torch.empty(1 + weights.draws + weights.calls, self._shape.numel(), device=device)
        self._parts[: 1 + weights.draws] = request.noise.to(device, torch.float32).flatten(1)
        # All at once: later, a copy to the device would be waited for at every step.
        self._inputs, self._latents, self._times = (
            tensor.to(device) for tensor in (weights.inputs, weights.latents, weights.timesteps)
        )

    @property
    def size(self) -> tuple[int, ...]:
        """Sizes that pictures of one call share: of the latents ``C,h,w``, and the tokens ``S``."""
        return (*self._shape, self.request.prompt_embeds.shape[1])

    @property
    def done(self) -> bool:
        """Whether there is no further call."""
        return self.call == self.request.coefficients.calls

    @property
    def reads(self) -> bool:
        """Whether the control is to be read back at the next call."""
        monitor = self.request.monitor
        return monitor is not None and monitor.wants(self.call)

    @property
    def scale(self) -> float:
        """Strength of the control at the next call."""
        return self.request.scales[self.call]

    @property
    def timesteps(self) -> Tensor:
        """Timestep of the next call for each of its rows, ``[rows]`` float32."""
        return self._times[self.call].expand(self.request.rows)

    @property
    def sample(self) -> Tensor:
        """What the model gets at the next call, ``[rows,C,h,w]`` float32."""
        return self._mix(self._inputs[self.call]).expand(self.request.rows, *self._shape)

    @property
    def latents(self) -> Tensor:
        """The latents so far, ``[1,C,h,w]`` float32.

        Raises:
            IndexError: before the first call there are none.
        """
        if self.call == 0:
            raise IndexError("No call has been made yet.")
        return self._mix(self._latents[self.call - 1])[None]

    def take(self, predicted: Tensor, reading: Tensor | None) -> None:
        """Go on to the next call.

        Args:
            predicted: what the model predicted for each of its rows, ``[rows,C,h,w]``.
            reading: what the probe read, ``[1,C,h,w]``; None: it was not to read.
        """
        if reading is not None and self.request.monitor is not None:
            self.request.monitor.take(self.call, self._times[self.call], reading)
        self._parts[self._known] = guide(predicted.float(), self.request).flatten()
        self.call += 1

    def finish(self) -> None:
        """Give the latents so far to whoever waits for them, or that they are not finite."""
        latents = self.latents
        finite = latents.isfinite().all().item()
        with suppress(InvalidStateError):  # it was thrown away meanwhile
            if finite:
                self.ticket.set_result(latents)
            else:
                self.ticket.set_exception(NotFiniteError(latents))

    def fail(self, error: Exception) -> None:
        """Give an error to whoever waits for the latents."""
        with suppress(InvalidStateError):
            self.ticket.set_exception(error)

    @property
    def _known(self) -> int:
        return 1 + self.request.coefficients.draws + self.call

    def _mix(self, weights: Tensor) -> Tensor:
        # What is not known yet is left out: 0 times what happens to be in memory may be NaN.
        return torch.mv(self._parts[: self._known].T, weights[: self._known]).reshape(self._shape)


def guide(predicted: Tensor, request: StepRequest) -> Tensor:
    """Return the prediction that the scheduler gets, ``[C,h,w]``, from those of all rows, ``[rows,C,h,w]``."""
    if len(predicted) == 1:
        return predicted[0]
    free, prompted = predicted
    guided = torch.lerp(free, prompted, request.guidance_scale)
    if request.guidance_rescale:
        (guided,) = rescale_noise_cfg(guided[None], prompted[None], request.guidance_rescale)
    return guided
