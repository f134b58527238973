"""What every pipeline on a bundle's engines shares: loading, moving, refusing, sizes, reading the control, report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTokenizer

from icexport.backends import table
from icexport.backends.engines import choose_backend, default_device, load_engine
from icexport.backends.probe_kernels import load_probe_kernels
from icexport.bundle.store import Bundle
from icexport.conditions import Condition
from icexport.errors import UnsupportedOptionError, UsageError
from icexport.fidelity.monitor import FidelityMonitor
from icexport.fidelity.report import FidelityReport
from icexport.models.precision import PRECISIONS
from icexport.models.probe import ProbeConfig
from icexport.models.sizes import size_multiple
from icexport.runtime.components import EngineControlNet, EngineTextEncoder, EngineUNet, EngineVae
from icexport.runtime.needs import Needs
from icexport.runtime.phases import Phases
from icexport.runtime.schedulers import load_scheduler
from icexport.runtime.step import StepGraphs

if TYPE_CHECKING:
    from typing_extensions import Self

    from engines.base import Engine

_UNSUPPORTED = {
    "ip_adapter_image": "IP-Adapters add attention layers that the exported UNet does not have",
    "ip_adapter_image_embeds": "IP-Adapters add attention layers that the exported UNet does not have",
    "cross_attention_kwargs": "attention is fixed in the exported graphs; merge LoRA weights before the build",
}


@dataclass(frozen=True)
class Loaded:
    """How a bundle was loaded.

    Attributes:
        bundle: the bundle.
        backend: name of the backend that runs it.
        cuda_graph: whether a step is launched at once.
        probe_kernels: whether the probe runs on Triton kernels of ours.
        low_memory: whether engines are open only while they are needed.
        needs: what calls are checked against; None: nothing.
        probe: the probe's engine; None: the bundle has none.
    """

    bundle: Bundle
    backend: str
    cuda_graph: bool
    probe_kernels: bool
    low_memory: bool
    needs: Needs | None
    probe: Engine | None


class Controlled:
    """A mixin for pipelines of diffusers whose models are a bundle's engines.

    Attributes:
        condition: scores the pictures; set one with other options if the control maps were extracted with them.
    """

    condition: Condition
    _loaded: Loaded
    _can_score = False

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
        low_memory: bool | None = None,
        preflight: bool = True,
    ) -> Self:
        """Load a bundle; the hash of every file that is used is checked.

        Args:
            bundle: a bundle or its folder.
            backend: name of a backend that the bundle was built for, or ``auto``.
            device: ``cpu``, ``cuda`` or ``cuda:<i>``; None: ``cuda`` if the backend runs nowhere else, else ``cpu``.
            safety_checker: a checker to run on the pictures, in PyTorch; needs a bundle with a feature extractor.
            cuda_graph: whether to launch ControlNet and UNet of a step at once; for backends that never wait for the
                GPU.
            probe_kernels: whether to read the control with the Triton kernels of ``engines.kernels`` instead of the
                backend's probe engine; on a GPU.
            low_memory: whether to keep engines open only while they are needed: text encoder, then ControlNet, UNet
                and probe, then decoder. Each picture then costs their loading, too. None: if a picture of the usual
                size does not fit into the free memory otherwise, which is logged.
            preflight: whether to refuse, here and in every call, what will not fit into the free memory, as far as
                the backend's needs are known.

        Raises:
            BundleError: there is no bundle, or it is damaged, of another schema, or not built for the backend.
            BackendUnavailableError: the backend cannot run on the device.
            OutOfMemoryError: not even the smallest picture would fit into the free memory.
            UnsupportedOptionError: ``cuda_graph`` or ``probe_kernels`` is not possible here or with ``low_memory``.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        device = device or default_device(bundle, backend)
        name = choose_backend(bundle, backend, device)
        needs = Needs.of(bundle.manifest, name, device) if preflight else None
        models, loaded = _load_models(bundle, name, device, cuda_graph, probe_kernels, low_memory, needs)
        arguments: dict[str, Any] = {
            **models,
            "tokenizer": CLIPTokenizer.from_pretrained(bundle.folder("tokenizer")),
            "scheduler": load_scheduler(bundle.folder("scheduler")),
            "safety_checker": safety_checker,
            "feature_extractor": _load_feature_extractor(bundle),
            "requires_safety_checker": safety_checker is not None,
        }
        pipe = cls(**arguments)
        pipe._loaded = loaded
        pipe.condition = bundle.condition()
        return pipe

    @property
    def bundle(self) -> Bundle:
        """The bundle that it runs."""
        return self._loaded.bundle

    @property
    def backend(self) -> str:
        """Name of the backend that runs it."""
        return self._loaded.backend

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self.unet.device  # type: ignore[attr-defined,no-any-return]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to another device by loading the engines there; the dtype is the bundle's and cannot change.

        Args:
            *args: a device, a dtype, a tensor that has both, or several of them, as for ``torch.nn.Module.to``.
            **kwargs: device and dtype by name.

        Raises:
            UnsupportedOptionError: a dtype other than the bundle's is asked for.
        """
        device, dtype = _parse_to(args, kwargs)
        own = self.unet.dtype  # type: ignore[attr-defined]
        if dtype is not None and dtype != own:
            option = next((name for name, row in PRECISIONS.items() if row.torch == dtype), "fp32")
            raise UnsupportedOptionError(
                f"The engines compute in {own}, which the export decided. For {dtype}, build a bundle with --dtype "
                f"{option}."
            )
        if device is None or torch.device(device) == self.device:
            return self
        was = self._loaded
        needs = was.needs and Needs.of(was.bundle.manifest, was.backend, device)
        options = was.cuda_graph, was.probe_kernels, was.low_memory, needs
        models, self._loaded = _load_models(was.bundle, was.backend, device, *options)
        self.register_modules(**models)  # type: ignore[attr-defined]
        if self.safety_checker is not None:  # type: ignore[attr-defined]
            self.safety_checker.to(device)  # type: ignore[attr-defined]
        return self

    def load_lora_weights(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: not possible on engines.

        Raises:
            UnsupportedOptionError: raised always; it says what to do.
        """
        raise UnsupportedOptionError(
            "Engines have their weights baked in. Fuse the LoRA into the model first (pipe.fuse_lora(), "
            "save_pretrained), then build a bundle from that folder."
        )

    def load_ip_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: not possible on engines.

        Raises:
            UnsupportedOptionError: raised always.
        """
        raise UnsupportedOptionError(f"IP-Adapters are not supported: {_UNSUPPORTED['ip_adapter_image']}.")

    def _refuse(self, options: Mapping[str, Any], unknown: Collection[str]) -> None:
        """Refuse options that a fixed graph cannot express, and arguments that nobody knows."""
        for name, value in options.items():
            if value is not None:
                raise UnsupportedOptionError(f"{name} is not supported: {_UNSUPPORTED[name]}.")
        if names := sorted(set(unknown) - {"callback", "callback_steps"}):
            raise TypeError(f"{type(self).__name__}() got unknown arguments: {', '.join(names)}")

    def _prepare(
        self,
        image: Any,
        prompt: Any,
        prompt_embeds: Tensor | None,
        size: tuple[int | None, int | None],
        per_prompt: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the control map(s) as they were given, ``[1 or prompts,3,H,W]`` in [0,1], and one for each picture.

        The size (height, width) is checked against the bundle's profile.
        """
        profile = self.bundle.manifest.profile
        multiple = size_multiple(self.unet.config, self.vae.config)  # type: ignore[attr-defined]
        height, width = size
        for axis, value in (("height", height), ("width", width)):
            if value is not None and value % multiple:
                raise UsageError(f"{axis}={value}: this model needs multiples of {multiple} pixels.")
        if prompt is None and prompt_embeds is None:
            raise UsageError("prompt is missing: give one, or prompt_embeds.")
        if image is None:
            raise UsageError("image is missing: give a control map, or extract one with icexport.conditions.")
        self.check_image(image, prompt, prompt_embeds)  # type: ignore[attr-defined]
        maps: Tensor = self.control_image_processor.preprocess(image, height=height, width=width)  # type: ignore[attr-defined]
        maps = maps.to(self.device, torch.float32)
        batch = prompt if isinstance(prompt, list) else prompt_embeds
        pictures = per_prompt * (1 if batch is None else len(batch))
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
        if needs := self._loaded.needs:
            unopened = needs.weights(low_memory=True) if self._loaded.low_memory else 0.0
            needs.check(maps.shape[2], maps.shape[3], pictures, unopened)
        each = maps.expand(pictures, -1, -1, -1) if len(maps) == 1 else maps.repeat_interleave(per_prompt, dim=0)
        return maps, each

    def _check_score(self, control_maps: Tensor) -> None:
        """Let missing weights of the condition's extractor show now, and not after the work."""
        if not self._can_score:
            self.condition.extract_batch(control_maps[:1])
            self._can_score = True

    def _watch(self, control_maps: Tensor, steps: bool | Collection[int]) -> FidelityMonitor | None:
        """Return what reads the control back while a picture is drawn; None: nothing can, or nothing is to.

        Args:
            control_maps: control maps ``[b,3,H,W]`` in [0,1].
            steps: True for every UNet call, or the 0-based calls to read; False: none.
        """
        probe = self._loaded.probe
        if steps is False or probe is None:
            return None
        config = ProbeConfig.from_dict(self.bundle.manifest.configs["probe"])
        chosen = None if isinstance(steps, bool) else steps
        return FidelityMonitor(probe, config, control_maps, chosen, kernels=self._loaded.probe_kernels)

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


def _load_models(
    bundle: Bundle,
    backend: str,
    device: str | torch.device,
    cuda_graph: bool,
    probe_kernels: bool,
    low_memory: bool | None,
    needs: Needs | None,
) -> tuple[dict[str, Any], Loaded]:
    """Return the models of a pipeline by their names in diffusers, and how they were loaded."""
    row = table.get(backend)
    if cuda_graph and not (row.capturable and torch.device(device).type == "cuda"):
        able = ", ".join(name for name, other in table.BACKENDS.items() if other.capturable)
        raise UnsupportedOptionError(
            f"cuda_graph=True: {backend} on {device} cannot be captured in a CUDA graph. Use one of {able} on a CUDA "
            "device, or leave it out."
        )
    if low_memory and (cuda_graph or probe_kernels):
        raise UnsupportedOptionError("low_memory=True closes engines that cuda_graph and probe_kernels need open.")
    low_memory = needs.choose_low_memory(bundle.manifest.profile, low_memory) if needs else bool(low_memory)
    configs = bundle.manifest.configs
    scratch = row.scratch(device)
    load: Callable[[str], Engine] = functools.partial(
        load_engine, bundle, backend=backend, device=device, scratch=scratch
    )
    if low_memory:
        load = Phases(bundle, backend, device, load).engine
    controlnet = EngineControlNet(load("controlnet"), configs["controlnet"])
    unet = EngineUNet(load("unet"), configs["unet"])
    if cuda_graph:
        unet.step_graphs = controlnet.step_graphs = StepGraphs(controlnet.engine, unet.engine)
    models = {
        "vae": EngineVae(load("vae_decoder"), configs["vae"]),
        "text_encoder": EngineTextEncoder(load("text_encoder"), configs["text_encoder"]),
        "unet": unet,
        "controlnet": controlnet,
    }
    probe = None
    if "probe" in bundle.manifest.graphs:
        probe = load_probe_kernels(bundle, device) if probe_kernels else load("probe")
    return models, Loaded(bundle, backend, cuda_graph, probe_kernels, low_memory, needs, probe)


def _load_feature_extractor(bundle: Bundle) -> CLIPImageProcessor | None:
    has_one = any(name.startswith("feature_extractor/") for name in bundle.manifest.files)
    return CLIPImageProcessor.from_pretrained(bundle.folder("feature_extractor")) if has_one else None


def _parse_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str | torch.device | None, Any]:
    """Return the device and dtype from the arguments of ``to``; None: not given."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, str | int | torch.device):
            device = value
    return torch.device(device) if isinstance(device, int) else device, dtype
