"""``InnerControlPipeline``: diffusers' ControlNet pipeline on a bundle's engines, with a fidelity report."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline
from torch import Tensor

from icexport.runtime.controlled import Controlled
from icexport.runtime.outputs import InnerControlPipelineOutput
from icexport.runtime.stepping import Loop, Stepping, choose_loop


class InnerControlPipeline(Stepping, Controlled, StableDiffusionControlNetPipeline):  # type: ignore[misc]
    """Text-to-image under one ControlNet, on engines.

    A drop-in for diffusers' ``StableDiffusionControlNetPipeline``: the same parameters in the same order with the same
    defaults and, with the same seed and scheduler in fp32, the same picture. Make one with ``from_pretrained``.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  diffusers' own default
        *,
        check_fidelity: bool | Collection[int] = True,
        loop: Loop = "auto",
        **kwargs: Any,
    ) -> InnerControlPipelineOutput | tuple[Any, list[bool] | None]:
        """Generate pictures; every parameter up to the star is diffusers' own.

        Args:
            prompt: one or several prompts.
            image: control map(s): PIL pictures of any mode, NumPy arrays or torch tensors ``[H,W]``, ``[H,W,C]``,
                ``[C,H,W]`` or batches of these (uint8, uint16, bool, or floats in [0,1]), or a list of them. Grey
                counts as three equal channels, transparent parts as black.
            height: height in pixels; like ``width`` only used for PIL pictures and arrays, the map is resized to it.
            width: width in pixels; see ``height``.
            num_inference_steps: number of denoising steps.
            timesteps: own timesteps instead, for schedulers that take them.
            sigmas: own sigmas instead, for schedulers that take them.
            guidance_scale: classifier-free guidance above 1.
            negative_prompt: what to avoid, with guidance.
            num_images_per_prompt: number of pictures for each prompt.
            eta: eta of DDIM.
            generator: one generator, or a list with one for each picture.
            latents: start noise ``[B,4,h,w]`` instead of drawn noise.
            prompt_embeds: embeddings ``[b,S,D]`` instead of ``prompt``.
            negative_prompt_embeds: embeddings ``[b,S,D]`` instead of ``negative_prompt``.
            ip_adapter_image: not supported.
            ip_adapter_image_embeds: not supported.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: whether to return an object; False: the plain tuple ``(images, nsfw_content_detected)``.
            cross_attention_kwargs: not supported.
            controlnet_conditioning_scale: strength of the control; 0 switches it off.
            guess_mode: whether to control without a prompt's help: weaker in shallow layers, absent in the
                unconditional half.
            control_guidance_start: share of the steps at which control begins.
            control_guidance_end: share of the steps at which it ends.
            clip_skip: number of layers of the text encoder to skip.
            callback_on_step_end: ``f(pipe, step, timestep, tensors) -> tensors``.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets and may change; none: it
                only looks on.
            check_fidelity: whether to read the control back with the probe at every UNet call, or at the 0-based calls
                given, and score the pictures. False: nothing of this is computed.
            loop: what draws. ``fast``: the step engine, which draws calls of several threads together and holds the
                scheduler as numbers. ``diffusers``: its own loop. ``auto``: the former where it is exact, which is
                unless the scheduler clips or a callback may change tensors.
            **kwargs: ``callback`` and ``callback_steps``, which diffusers deprecates.

        Returns:
            Pictures with ``.fidelity``, or the plain tuple.

        Raises:
            UnsupportedOptionError: a fixed graph cannot express an option; the message says what to do.
            UsageError: a size is outside the bundle's profile, or arguments contradict each other.
            ConditionError: the pictures cannot be scored, because the condition's extractor lacks its weights.
        """
        refused = {"ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds}
        self._refuse(refused | {"cross_attention_kwargs": cross_attention_kwargs}, kwargs)
        with self._call():
            if isinstance(controlnet_conditioning_scale, int):
                controlnet_conditioning_scale = float(controlnet_conditioning_scale)  # diffusers takes floats only
            self._check_embeds(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
            # What steers is what judges: diffusers, the monitor and the score get the same tensor.
            steering, control_maps = self._prepare(
                image, prompt, prompt_embeds, (height, width), num_images_per_prompt or 1
            )
            scored = check_fidelity is not False and output_type != "latent"
            if scored:
                self._check_score(control_maps)
            options: dict[str, Any] = {
                "prompt": prompt,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "negative_prompt": negative_prompt,
                "num_images_per_prompt": num_images_per_prompt or 1,
                "generator": generator,
                "latents": latents,
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                "output_type": "pt" if scored else output_type,
                "controlnet_conditioning_scale": controlnet_conditioning_scale,
                "guess_mode": guess_mode,
                "control_guidance_start": control_guidance_start,
                "control_guidance_end": control_guidance_end,
                "clip_skip": clip_skip,
                "callback_on_step_end": callback_on_step_end,
            }
            times: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
            callbacks = {
                "callback_on_step_end": callback_on_step_end if callback_on_step_end_tensor_inputs else None,
                "callback": kwargs.get("callback"),
            }
            changed_by = [name for name, callback in callbacks.items() if callback is not None]
            weights = choose_loop(
                loop, self._loaded.step_engine, self.scheduler, num_inference_steps, changed_by=changed_by, **times
            )
            if weights is not None:
                each = [self._watch(one[None], check_fidelity, weights.calls) for one in control_maps]
                requests = self._requests(weights, each, image=control_maps, **options)
                kind = options["output_type"]
                own = timesteps is not None or sigmas is not None  # each of them is a step, as diffusers counts
                steps = weights.calls if own else num_inference_steps
                images, nsfw = self._draw_fast(requests, steps, callback_on_step_end, kind)
            else:
                calls = self._count_calls(num_inference_steps, timesteps, sigmas) if check_fidelity is not False else 0
                each = [self._watch(control_maps, check_fidelity, calls)]
                (self.unet.observer,) = each
                try:
                    images, nsfw = super().__call__(
                        image=steering,
                        return_dict=False,
                        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                        **options,
                        **times,
                        **kwargs,
                    )
                finally:
                    self.unet.observer = None
            report = None
            if check_fidelity is not False:
                scores = self.condition.score(images.float(), control_maps).tolist() if scored else None
                report = self._report(scores, [monitor for monitor in each if monitor])
            if scored and output_type != "pt":
                images = self.image_processor.pt_to_numpy(images)
                images = self.image_processor.numpy_to_pil(images) if output_type == "pil" else images
        if not return_dict:
            return images, nsfw
        return InnerControlPipelineOutput(images=images, nsfw_content_detected=nsfw, fidelity=report)
