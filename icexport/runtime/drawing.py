"""Any number of pictures from one request, split into calls that the pipeline takes, each with its own seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from icexport.errors import UsageError
from icexport.fidelity.report import FidelityReport
from icexport.graphs.profile import SizeRange
from icexport.runtime.controlled import Controlled


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        prompt: one prompt for all pictures, or one for each.
        seeds: seeds of the pictures, in their order; a picture depends on its own only, however they are split into
            calls.
        negative_prompt: what to avoid.
        steps: number of denoising steps.
        guidance_scale: weight of the prompt; 1: no guidance.
        controlnet_scale: weight of the control; 0: off.
    """

    prompt: str | Sequence[str]
    seeds: Sequence[int]
    negative_prompt: str = ""
    steps: int = 20
    guidance_scale: float = 7.5
    controlnet_scale: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """Some or all pictures of a request.

    Attributes:
        pictures: float32 ``[N,3,H,W]`` in [0,1] on the CPU.
        report: report of how well they follow their control maps; None where it was not asked for.
    """

    pictures: Tensor
    report: FidelityReport | None

    @property
    def checked(self) -> FidelityReport:
        """The report of pictures that were checked.

        Raises:
            UsageError: the pictures were not checked.
        """
        if self.report is None:
            raise UsageError("These pictures were drawn without a fidelity check.")
        return self.report


def draw(
    pipe: Any,
    control_maps: Tensor,
    request: Request,
    *,
    calls: SizeRange,
    check_fidelity: bool | Collection[int] = False,
    callback: Callable[..., dict[str, Tensor]] | None = None,
) -> Drawn:
    """Draw all pictures of a request; arguments and errors are those of ``draw_calls``."""
    parts = list(
        draw_calls(pipe, control_maps, request, calls=calls, check_fidelity=check_fidelity, callback=callback)
    )
    reports = [part.report for part in parts if part.report is not None]
    return Drawn(torch.cat([part.pictures for part in parts]), joined(reports) if reports else None)


def draw_calls(
    pipe: Any,
    control_maps: Tensor,
    request: Request,
    *,
    calls: SizeRange,
    check_fidelity: bool | Collection[int] = False,
    callback: Callable[..., dict[str, Tensor]] | None = None,
) -> Iterator[Drawn]:
    """Draw the pictures of a request, a call at a time.

    Args:
        pipe: a pipeline of ours, or diffusers' own one, which knows nothing of fidelity.
        control_maps: control maps ``[N,3,H,W]`` in [0,1], one for each picture, or ``[1,3,H,W]`` for all of them.
        request: what to draw.
        calls: how many pictures one call takes. Where fewer are left, the last one is drawn again and thrown away.
        check_fidelity: whether, or at which calls, to check, as the pipeline takes it; only for a pipeline of ours.
        callback: called at the end of every step, as diffusers does, without tensors.

    Yields:
        The pictures of each call, in the order of the seeds.

    Raises:
        UsageError: the control maps or prompts do not fit the seeds; or what the pipeline raises.
    """
    count = len(request.seeds)
    single = isinstance(request.prompt, str) and len(control_maps) == 1
    prompts = [request.prompt] * count if isinstance(request.prompt, str) else request.prompt
    if len(control_maps) not in (1, count) or len(prompts) != count:
        raise UsageError(f"{count} seeds, but {len(control_maps)} control maps and {len(prompts)} prompts.")
    options: dict[str, Any] = {"check_fidelity": check_fidelity} if isinstance(pipe, Controlled) else {}
    for index in split_calls(count, calls):
        padded = [*index, *[index[-1]] * max(0, calls.min - len(index))]
        found: Any = pipe(
            request.prompt if single else [prompts[i] for i in padded],
            image=control_maps if len(control_maps) == 1 else control_maps[padded],
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            negative_prompt=request.negative_prompt if single else [request.negative_prompt] * len(padded),
            num_images_per_prompt=len(padded) if single else 1,
            # On the CPU, whose random numbers are the same everywhere.
            generator=[torch.Generator().manual_seed(request.seeds[i]) for i in padded],
            controlnet_conditioning_scale=request.controlnet_scale,
            output_type="pt",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=[],
            **options,
        )
        report = found.fidelity.first(len(index)) if options and found.fidelity is not None else None
        yield Drawn(found.images[: len(index)].float().cpu(), report)


def split_calls(count: int, calls: SizeRange) -> Iterator[list[int]]:
    """Yield indices of the pictures of each call, as even as possible."""
    number = -(-count // calls.max)
    start = 0
    for i in range(number):
        size = count // number + (i < count % number)
        yield list(range(start, start + size))
        start += size


def joined(reports: list[FidelityReport]) -> FidelityReport:
    """Return the reports of several calls as one; a heat map would be of the last call only, and is left out."""
    if len(reports) == 1:
        return reports[0]
    scores = None
    if all(report.scores is not None for report in reports):
        scores = [score for report in reports for score in report.scores or []]
    steps = [
        replace(same[0], errors=[error for reading in same for error in reading.errors])
        for same in zip(*(report.steps for report in reports), strict=False)  # a call may have ended early
    ]
    return replace(reports[0], scores=scores, steps=steps, heat_map=None)
