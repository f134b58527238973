"""``InnerControlPipeline``: diffusers' ControlNet pipeline on a bundle's engines, with a fidelity report."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTokenizer

from icexport import conditions
from icexport.backends.engines import choose_backend, default_device, load_engine
from icexport.backends.probe_kernels import load_probe_kernels
from icexport.backends.tensorrt import make_scratch
from icexport.bundle.store import Bundle
from icexport.errors import UnsupportedOptionError, UsageError
from icexport.fidelity.monitor import FidelityMonitor
from icexport.fidelity.report import FidelityReport
from icexport.graphs.profile import Profile
from icexport.models.dtypes import DTYPES
from icexport.models.probe import ProbeConfig
from icexport.models.sizes import size_multiple
from icexport.runtime.components import EngineControlNet, EngineTextEncoder, EngineUNet, EngineVae
from icexport.runtime.outputs import InnerControlPipelineOutput
from icexport.runtime.schedulers import load_scheduler
from icexport.runtime.step import StepGraphs

_UNSUPPORTED = {
    "ip_adapter_image": "IP-Adapters add attention layers that the exported UNet does not have",
    "ip_adapter_image_embeds": "IP-Adapters add attention layers that the exported UNet does not have",
    "cross_attention_kwargs": "attention is fixed in the exported graphs; merge LoRA weights before the build",
}


class InnerControlPipeline(StableDiffusionControlNetPipeline):  # type: ignore[misc]
    """Text-to-image under one ControlNet, on engines.

    A drop-in for diffusers' ``StableDiffusionControlNetPipeline``: the same parameters in the same order with the same
    defaults and, with the same seed and scheduler in fp32, the same picture. Make one with ``from_pretrained``.

    Attributes:
        bundle: what it runs.
        backend: name of the backend that runs it.
        condition: scores the pictures; set one with other options if the control maps were extracted with them.
    """

    bundle: Bundle
    backend: str
    condition: conditions.Condition

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path | Bundle,
        *,
        backend: str = "auto",
        device: str | torch.device | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        cuda_graph: bool = False,
        probe_kernels: bool = False,
    ) -> InnerControlPipeline:
        """Load a bundle; the hash of every file that is used is checked.

        Args:
            bundle: a bundle or its folder.
            backend: ``auto`` or one that the bundle was built for.
            device: ``cpu``, ``cuda`` or ``cuda:<i>``; None: ``cuda`` if the backend runs nowhere else, else ``cpu``.
            safety_checker: a checker to run on the pictures, in PyTorch; needs a bundle with a feature extractor.
            cuda_graph: launch ControlNet and UNet of a step at once; for the backends ``tensorrt``, ``tensorrt-rtx``
                and ``torch`` on a GPU.
            probe_kernels: read the control with the Triton kernels of ``engines.kernels`` instead of the backend's
                probe engine; on a GPU.

        Raises:
            BundleError: no bundle, damaged, of a newer schema, or not built for the backend.
            BackendUnavailableError: the backend cannot run on the device.
            UnsupportedOptionError: ``cuda_graph`` or ``probe_kernels`` is not possible here.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        device = device or default_device(bundle, backend)
        name = choose_backend(bundle, backend, device)
        configs = bundle.manifest.configs
        load = functools.partial(load_engine, bundle, backend=name, device=device, scratch=make_scratch(name, device))
        pipe = cls(
            vae=EngineVae(load("vae_decoder"), configs["vae"]),
            text_encoder=EngineTextEncoder(load("text_encoder"), configs["text_encoder"]),
            tokenizer=CLIPTokenizer.from_pretrained(bundle.folder("tokenizer")),
            unet=EngineUNet(load("unet"), configs["unet"]),
            controlnet=EngineControlNet(load("controlnet"), configs["controlnet"]),
            scheduler=load_scheduler(bundle),
            safety_checker=safety_checker,
            feature_extractor=_load_feature_extractor(bundle),
            requires_safety_checker=safety_checker is not None,
        )
        pipe.bundle, pipe.backend = bundle, name
        pipe._cuda_graph, pipe._probe_kernels = cuda_graph, probe_kernels
        if "probe" in bundle.manifest.graphs:
            pipe._probe = load_probe_kernels(bundle, device) if probe_kernels else load("probe")
        if cuda_graph:
            pipe.unet.graphs = pipe.controlnet.graphs = StepGraphs(pipe.controlnet.engine, pipe.unet.engine)
        pipe.condition = bundle.condition()
        return pipe

    _probe: Any = None
    _cuda_graph = False
    _probe_kernels = False
    _can_score = False

    def to(self, *args: Any, **kwargs: Any) -> InnerControlPipeline:
        """Move to another device by loading the engines there; the dtype is the bundle's and cannot change.

        Raises:
            UnsupportedOptionError: a dtype other than the bundle's is asked for.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.unet.dtype:
            option = next((name for name, known in DTYPES.items() if known == dtype), "fp32")
            raise UnsupportedOptionError(
                f"The engines compute in {self.unet.dtype}, which the export decided. For {dtype}, build a bundle "
                f"with --dtype {option}."
            )
        if device is None or torch.device(device) == self.device:
            return self
        options = {"cuda_graph": self._cuda_graph, "probe_kernels": self._probe_kernels}
        moved = type(self).from_pretrained(self.bundle, backend=self.backend, device=device, **options)
        for name in ("vae", "text_encoder", "unet", "controlnet"):
            self.register_modules(**{name: getattr(moved, name)})
        self._probe = moved._probe
        if self.safety_checker is not None:
            self.safety_checker.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self.unet.device  # type: ignore[no-any-return]

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
        **kwargs: Any,
    ) -> InnerControlPipelineOutput | tuple[Any, list[bool] | None]:
        """Generate pictures; every parameter up to the star is diffusers' own.

        Args:
            prompt: one or several prompts.
            image: control map(s): PIL pictures, arrays or tensors ``[B,3,H,W]`` in [0,1].
            height: pixels; like ``width`` only used for PIL pictures and arrays, the map is resized to it.
            width: see ``height``.
            num_inference_steps: denoising steps.
            timesteps: own timesteps instead, for schedulers that take them.
            sigmas: own sigmas instead, for schedulers that take them.
            guidance_scale: classifier-free guidance above 1.
            negative_prompt: what to avoid, with guidance.
            num_images_per_prompt: pictures for each prompt.
            eta: of DDIM.
            generator: one, or a list with one for each picture.
            latents: start noise ``[B,4,h,w]`` instead of drawn noise.
            prompt_embeds: ``[b,S,D]`` instead of ``prompt``.
            negative_prompt_embeds: ``[b,S,D]`` instead of ``negative_prompt``.
            ip_adapter_image: not supported.
            ip_adapter_image_embeds: not supported.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: False: the plain tuple ``(images, nsfw_content_detected)``.
            cross_attention_kwargs: not supported.
            controlnet_conditioning_scale: strength of the control; 0 switches it off.
            guess_mode: control without a prompt's help: weaker in shallow layers, absent in the unconditional half.
            control_guidance_start: share of the steps at which control begins.
            control_guidance_end: share of the steps at which it ends.
            clip_skip: layers of the text encoder to skip.
            callback_on_step_end: ``f(pipe, step, timestep, tensors) -> tensors``.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets.
            check_fidelity: read the control back with the probe at every UNet call, or at the 0-based calls given, and
                score the pictures. False: nothing of this is computed.
            **kwargs: ``callback`` and ``callback_steps``, which diffusers deprecates.

        Returns:
            Pictures with ``.fidelity``, or the plain tuple.

        Raises:
            UnsupportedOptionError: an option that a fixed graph cannot express; the message says what to do.
            UsageError: a size outside the bundle's profile, or arguments that contradict each other.
            ConditionError: the pictures cannot be scored, because the condition's extractor lacks its weights.
        """
        given = {"ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds}
        for name, value in (given | {"cross_attention_kwargs": cross_attention_kwargs}).items():
            if value is not None:
                raise UnsupportedOptionError(f"{name} is not supported: {_UNSUPPORTED[name]}.")
        if unknown := sorted(set(kwargs) - {"callback", "callback_steps"}):
            raise TypeError(f"InnerControlPipeline() got unknown arguments: {', '.join(unknown)}")
        if isinstance(controlnet_conditioning_scale, int):
            controlnet_conditioning_scale = float(controlnet_conditioning_scale)  # diffusers takes floats only
        control_maps = self._control_maps(prompt, prompt_embeds, image, height, width, num_images_per_prompt or 1)
        scored = check_fidelity is not False and output_type != "latent"
        if scored and not self._can_score:
            self.condition.extract_batch(control_maps[:1])  # missing weights must show now, not after the work
            self._can_score = True
        monitor = None
        if check_fidelity is not False and self._probe is not None:
            monitor = self._monitor(control_maps, check_fidelity)
        self.unet.observer = monitor
        try:
            images, nsfw = super().__call__(
                prompt=prompt,
                image=image,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                eta=eta,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                output_type="pt" if scored else output_type,
                return_dict=False,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                guess_mode=guess_mode,
                control_guidance_start=control_guidance_start,
                control_guidance_end=control_guidance_end,
                clip_skip=clip_skip,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                **kwargs,
            )
        finally:
            self.unet.observer = None
        report = None
        if check_fidelity is not False:
            scores = self.condition.score(images.float(), control_maps).tolist() if scored else None
            report = self._report(scores, monitor)
        if scored and output_type != "pt":
            images = self.image_processor.pt_to_numpy(images)
            images = self.image_processor.numpy_to_pil(images) if output_type == "pil" else images
        if not return_dict:
            return images, nsfw
        return InnerControlPipelineOutput(images=images, nsfw_content_detected=nsfw, fidelity=report)

    def load_lora_weights(self, *_args: Any, **_kwargs: Any) -> None:
        """Not possible on engines.

        Raises:
            UnsupportedOptionError: always; it says what to do.
        """
        raise UnsupportedOptionError(
            "Engines have their weights baked in. Fuse the LoRA into the model first (pipe.fuse_lora(), "
            "save_pretrained), then build a bundle from that folder."
        )

    def load_ip_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Not possible on engines.

        Raises:
            UnsupportedOptionError: always.
        """
        raise UnsupportedOptionError(f"IP-Adapters are not supported: {_UNSUPPORTED['ip_adapter_image']}.")

    def _control_maps(
        self,
        prompt: Any,
        prompt_embeds: Tensor | None,
        image: Any,
        height: int | None,
        width: int | None,
        per_prompt: int,
    ) -> Tensor:
        """One control map for each picture, ``[b,3,H,W]`` in [0,1], after checking sizes against the profile."""
        profile: Profile = self.bundle.manifest.profile
        multiple = size_multiple(self.unet.config, self.vae.config)
        for axis, value in (("height", height), ("width", width)):
            if value is not None and value % multiple:
                raise UsageError(f"{axis}={value}: this model needs multiples of {multiple} pixels.")
        if prompt is None and prompt_embeds is None:
            raise UsageError("prompt is missing: give one, or prompt_embeds.")
        if image is None:
            raise UsageError("image is missing: give a control map, or extract one with icexport.conditions.")
        self.check_image(image, prompt, prompt_embeds)
        batch = prompt if isinstance(prompt, list) else prompt_embeds
        prompts = 1 if batch is None else len(batch)
        pictures = prompts * per_prompt
        maps: Tensor = self.prepare_image(
            image, width, height, pictures, per_prompt, self.device, torch.float32, do_classifier_free_guidance=False
        )
        for axis, value in (("height", maps.shape[2]), ("width", maps.shape[3]), ("batch", pictures)):
            allowed = getattr(profile, axis)
            if value not in allowed:
                option = "batch-size" if axis == "batch" else axis
                what = f"{value} pictures in one call" if axis == "batch" else f"{axis} {value}"
                raise UsageError(
                    f"{what}: the bundle {self.bundle.path} takes {allowed}. Build one with --{option} MIN:OPT:MAX "
                    f"that contains {value}{'' if axis == 'batch' else ', or resize the control map'}."
                )
            if axis != "batch" and value % multiple:
                raise UsageError(f"{axis} {value}: this model needs multiples of {multiple} pixels.")
        profile.check_shape(maps.shape[2], maps.shape[3])
        return maps

    def _monitor(self, control_maps: Tensor, steps: bool | Collection[int]) -> FidelityMonitor:
        config = ProbeConfig.from_dict(self.bundle.manifest.configs["probe"])
        return FidelityMonitor(
            self._probe,
            len(config.dims),
            control_maps,
            config.control_range,
            config.normaliser,
            None if isinstance(steps, bool) else steps,
            kernels=self._probe_kernels,
        )

    def _report(self, scores: list[float] | None, monitor: FidelityMonitor | None) -> FidelityReport:
        steps, heat_map = monitor.finish() if monitor else ([], None)
        return FidelityReport(
            condition=self.condition.name,
            metric=self.condition.metric,
            unit=self.condition.unit,
            higher_is_better=self.condition.higher_is_better,
            scores=scores,
            steps=steps,
            heat_map=None if heat_map is None else heat_map.numpy(),
        )


def _load_feature_extractor(bundle: Bundle) -> CLIPImageProcessor | None:
    has_one = any(name.startswith("feature_extractor/") for name in bundle.manifest.files)
    return CLIPImageProcessor.from_pretrained(bundle.folder("feature_extractor")) if has_one else None
