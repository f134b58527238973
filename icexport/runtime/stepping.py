"""Drawing with the step engine in place of diffusers' loop: the same pictures, and no scheduler that keeps state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from icexport.errors import UnsupportedOptionError, UsageError
from icexport.fidelity.monitor import FidelityMonitor
from icexport.runtime.coefficients import Coefficients, NotLinearError, coefficients
from icexport.runtime.slots import NotFiniteError, StepRequest
from icexport.runtime.step_engine import StepEngine

logger = logging.getLogger(__name__)

Loop = Literal["auto", "diffusers", "fast"]
"""What draws: the step engine where it is exact, always diffusers' loop, or always the step engine."""

_NO_SINGLE = "takes no single picture: build with --batch-size 1 or 1:1:4"


def choose_loop(
    loop: Loop,
    engine: StepEngine | None,
    scheduler: SchedulerMixin,
    steps: int,
    *,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    eta: float,
    changed_by: Collection[str],
) -> Coefficients | None:
    """Return what stands for the scheduler in the step engine; None: diffusers' loop draws, and the log says why.

    Args:
        loop: what the user says.
        engine: the step engine; None: the bundle's engines do not fit it.
        scheduler: the scheduler.
        steps: number of steps.
        timesteps: own timesteps instead.
        sigmas: own sigmas instead.
        eta: eta of DDIM.
        changed_by: names of options by which tensors of the loop may be changed.

    Raises:
        UsageError: there is no such loop.
        UnsupportedOptionError: the step engine is wanted and cannot draw this.
    """
    if loop not in get_args(Loop):
        raise UsageError(f"loop={loop!r}: choose {', '.join(get_args(Loop))}.")
    if loop == "diffusers":
        return None
    if engine is None:
        reason = f"the bundle {_NO_SINGLE}"
    elif changed_by:
        reason = f"{' and '.join(changed_by)} may change tensors of the loop"
    else:
        try:
            own = timesteps is not None or sigmas is not None
            return coefficients(scheduler, None if own else steps, timesteps=timesteps, sigmas=sigmas, eta=eta)
        except NotLinearError as error:
            reason = str(error)
    if loop == "fast":
        raise UnsupportedOptionError(f"loop='fast' cannot draw this: {reason}.")
    logger.info("diffusers' own loop draws this: %s.", reason)
    return None


class Stepping:
    """A mixin for pipelines of Stable Diffusion: pictures as requests to the step engine, and what becomes of them."""

    @property
    def step_engine(self: Any) -> StepEngine:
        """What draws the pictures of this pipeline and of its forks together; ``step_requests`` makes requests to it.

        Raises:
            UnsupportedOptionError: the bundle takes no single picture.
        """
        engine: StepEngine | None = self._loaded.step_engine
        if engine is None:
            raise UnsupportedOptionError(f"The bundle {self.bundle.path} {_NO_SINGLE}.")
        return engine

    @torch.no_grad()
    def step_requests(
        self: Any,
        prompt: str | list[str],
        image: Any,
        *,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        controlnet_conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        clip_skip: int | None = None,
        check_fidelity: bool | Collection[int] = True,
    ) -> list[StepRequest]:
        """Return one request for each picture, for who drives the step engine; arguments are those of ``__call__``.

        Args:
            prompt: one or several prompts.
            image: control map(s).
            num_inference_steps: number of denoising steps.
            timesteps: own timesteps instead.
            sigmas: own sigmas instead.
            guidance_scale: classifier-free guidance above 1.
            guidance_rescale: see ``StepRequest``.
            negative_prompt: what to avoid, with guidance.
            num_images_per_prompt: number of pictures for each prompt.
            eta: eta of DDIM.
            generator: one generator, or a list with one for each picture.
            controlnet_conditioning_scale: strength of the control.
            guess_mode: see ``StepRequest``.
            control_guidance_start: share of the steps at which control begins.
            control_guidance_end: share of the steps at which it ends.
            clip_skip: number of layers of the text encoder to skip.
            check_fidelity: calls at which the probe reads; the request's ``monitor`` has the readings afterwards.

        Raises:
            UsageError: a size is outside the bundle's profile, or arguments contradict each other.
            UnsupportedOptionError: the scheduler is not linear, or the bundle takes no single picture.
        """
        with self._call():
            _, maps = self._prepare(image, prompt, None, (None, None), num_images_per_prompt)
            times: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
            weights = choose_loop(
                "fast", self._loaded.step_engine, self.scheduler, num_inference_steps, changed_by=(), **times
            )
            monitors = [self._watch(one[None], check_fidelity, weights.calls) for one in maps] if weights else []
            requests: list[StepRequest] = self._requests(
                weights,
                monitors,
                prompt=prompt,
                image=maps,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                negative_prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                guess_mode=guess_mode,
                control_guidance_start=control_guidance_start,
                control_guidance_end=control_guidance_end,
                clip_skip=clip_skip,
            )
            return requests

    @torch.no_grad()
    def pictures(self: Any, latents: Tensor, output_type: str = "pil") -> Any:
        """Return the pictures of finished latents.

        Args:
            latents: what a ticket of the step engine gives, ``[b,C,h,w]``.
            output_type: ``pil``, ``np`` or ``pt``.
        """
        with self._call():
            return self._finished(latents.to(self.unet.dtype), output_type)[0]

    def _requests(
        self: Any,
        weights: Coefficients,
        monitors: Sequence[FidelityMonitor | None],
        *,
        prompt: str | list[str] | None,
        image: Tensor,
        guidance_scale: float,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        controlnet_conditioning_scale: float | list[float],
        guess_mode: bool,
        control_guidance_start: float | list[float],
        control_guidance_end: float | list[float],
        clip_skip: int | None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        guidance_rescale: float = 0.0,
        **_others: Any,
    ) -> list[StepRequest]:
        """Return one request for each picture, from what stands for scheduler and steps, and what reads the control.

        The rest is as for ``__call__``, but ``image``: one control map for each picture, ``[b,3,H,W]`` in [0,1].
        """
        self._guidance_scale, self._clip_skip, self._interrupt = guidance_scale, clip_skip, False
        self._cross_attention_kwargs = None
        self._num_timesteps = weights.calls
        starts, ends = (
            value if isinstance(value, list) else [value] for value in (control_guidance_start, control_guidance_end)
        )
        self.check_inputs(
            prompt,
            image[:1],
            1,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=starts,
            control_guidance_end=ends,
        )
        scale = controlnet_conditioning_scale
        scales = _strengths(scale[0] if isinstance(scale, list) else scale, starts[0], ends[0], weights.calls)
        guided = self.do_classifier_free_guidance
        embeds, negative = self.encode_prompt(
            prompt,
            self.device,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
        )
        prompts = torch.stack([negative, embeds], dim=1) if guided else embeds[:, None]
        noise = self._noise(weights.draws, image, embeds.dtype, generator, latents)
        return [
            StepRequest(
                weights,
                noise[:, index],
                prompts[index],
                image[index],
                scales,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                guess_mode=guess_mode,
                monitor=monitor,
            )
            for index, monitor in enumerate(monitors)
        ]

    def _draw_fast(
        self: Any, requests: Sequence[StepRequest], steps: int, callback: Any, output_type: str | None
    ) -> tuple[Any, list[bool] | None]:
        """Draw requests of equal calls; return what ``__call__`` of diffusers' pipeline does.

        Args:
            requests: the pictures.
            steps: number of steps, for the progress bar.
            callback: called after every call without tensors, or None.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
        """
        progress = _Progress(self, requests[0].coefficients, steps, callback)
        # All that belongs to the call is in its requests: others may begin, and be drawn together with it.
        with self.unet.turn.others() if self._loaded.concurrent else nullcontext(), progress:
            latents = draw(self.step_engine, requests, progress.look)
        images, flagged = self._finished(latents.to(self.unet.dtype), output_type)
        return images, flagged

    def _noise(
        self: Any,
        draws: int,
        maps: Tensor,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Return start noise and that of the steps, ``[1+N,b,C,h,w]``, drawn in the order in which diffusers does."""
        pictures, _, height, width = maps.shape
        if isinstance(generator, list) and len(generator) != pictures:
            raise UsageError(f"There are {len(generator)} generators for {pictures} pictures.")
        cells = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shape = (pictures, self.unet.config.in_channels, *cells)
        if latents is not None and tuple(latents.shape) != shape:
            raise UsageError(
                f"latents have shape {tuple(latents.shape)}; the control map and prompts make it {shape}."
            )

        def drawn() -> Tensor:
            noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=dtype)
            return noise

        start = drawn() if latents is None else latents.to(self.device, dtype)
        return torch.stack([start, *(drawn() for _ in range(draws))])

    def _finished(self: Any, latents: Tensor, output_type: str | None) -> tuple[Any, list[bool] | None]:
        """Return pictures of latents, and which of them the safety checker flagged."""
        images, flagged = latents, None
        if output_type != "latent":
            (images,) = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)
            images, flagged = self.run_safety_checker(images, self.device, latents.dtype)
        shown = [True] * len(images) if flagged is None else [not flag for flag in flagged]
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=shown), flagged


def draw(engine: StepEngine, requests: Sequence[StepRequest], look: Callable[[int], bool]) -> Tensor:
    """Draw pictures of equal calls to their end; return their latents ``[b,C,h,w]`` float32, finite or not.

    Args:
        engine: draws them, and what other threads bring.
        requests: the pictures.
        look: told after every call how many of these pictures' calls are made; True ends them now.

    Raises:
        UsageError: a picture does not fit the engine.
        OutOfMemoryError: it does not fit into the free memory.
        EngineError: an engine failed.
    """
    calls = requests[0].coefficients.calls
    tickets: list[Future[Tensor]] = []

    def watch() -> None:
        made = (engine.calls(ticket) for ticket in tickets)
        if look(min(calls if count is None else count for count in made)):
            for ticket in tickets:
                engine.retire(ticket)

    try:
        tickets.extend(engine.admit(request) for request in requests)
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    engine.drive(tickets, watch)
    return torch.cat([_latents(ticket) for ticket in tickets])


def _latents(ticket: Future[Tensor]) -> Tensor:
    try:
        return ticket.result()
    except NotFiniteError as error:  # diffusers' loop would go on with them; the report does not pass
        return error.latents


def _strengths(scale: float, start: float, end: float, calls: int) -> list[float]:
    """Return the strength of the control at each call: none outside of the window, as diffusers reckons it."""
    return [scale * (1.0 - float(i / calls < start or (i + 1) / calls > end)) for i in range(calls)]


class _Progress:
    """Tells a bar and a callback how far the pictures are, step by step, as diffusers' loop does.

    Args:
        pipe: the pipeline; its ``interrupt`` ends the pictures.
        weights: what stands for scheduler and steps.
        steps: number of steps.
        callback: ``f(pipe, call, timestep, {})``, or None.
    """

    def __init__(self, pipe: Any, weights: Coefficients, steps: int, callback: Any) -> None:
        self._pipe, self._weights, self._callback = pipe, weights, callback
        self._order = pipe.scheduler.order
        self._before = weights.calls - steps * self._order
        self._bar = pipe.progress_bar(total=steps)
        self._told = 0

    def __enter__(self) -> None:
        self._bar.__enter__()

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def look(self, made: int) -> bool:
        """Tell of the calls up to this one; return whether the pictures are to end now."""
        for call in range(self._told, made):
            self._told = call + 1
            if self._callback is not None:
                changed = self._callback(self._pipe, call, self._weights.timesteps[call], {})
                if changed:
                    raise UsageError(
                        f"The callback returned {', '.join(changed)}, which it was not given. To change tensors, name "
                        "them in callback_on_step_end_tensor_inputs."
                    )
            if call + 1 == self._weights.calls or (call >= self._before and (call + 1) % self._order == 0):
                self._bar.update()
        return bool(self._pipe.interrupt)
