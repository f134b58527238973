"""What every pipeline on a bundle's engines shares: loading, moving, refusing, sizes, reading the control, report."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.controlnet.pipeline_controlnet import retrieve_timesteps
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTokenizer

from icexport.backends.engines import choose_backend, default_device
from icexport.bundle.store import Bundle
from icexport.conditions import Condition
from icexport.errors import UnsupportedOptionError, UsageError
from icexport.fidelity.monitor import FidelityMonitor, finished
from icexport.fidelity.report import FidelityReport
from icexport.graphs.profile import SizeRange
from icexport.host.pixels import as_pictures
from icexport.models.precision import PRECISIONS
from icexport.models.probe import ProbeConfig
from icexport.models.sizes import size_multiple
from icexport.runtime.components import EngineUNet
from icexport.runtime.loading import Loaded, load_models, stand_ins
from icexport.runtime.needs import Needs
from icexport.runtime.refused import IP_ADAPTERS, Refusals
from icexport.runtime.schedulers import load_scheduler
from icexport.runtime.turn import Turn

if TYPE_CHECKING:
    from typing_extensions import Self

_UNSUPPORTED = {
    "ip_adapter_image": IP_ADAPTERS,
    "ip_adapter_image_embeds": IP_ADAPTERS,
    "cross_attention_kwargs": "attention is fixed in the exported graphs; merge LoRA weights before the build",
}


class Controlled(Refusals):
    """A mixin for pipelines of diffusers whose models are a bundle's engines.

    Threads: several may call one pipeline. What the step engine draws is drawn together; what diffusers' loop draws is
    drawn in turns, since that keeps what belongs to a call in the pipeline and its scheduler. ``fork`` gives a second
    pipeline on the same engines, with a scheduler of its own.
    """

    _condition: Condition | None = None
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
        models = load_models(bundle, name, device, cuda_graph, probe_kernels, low_memory, needs)
        arguments: dict[str, Any] = {
            **models,
            "tokenizer": CLIPTokenizer.from_pretrained(bundle.folder("tokenizer")),
            "scheduler": load_scheduler(bundle.folder("scheduler")),
            "safety_checker": safety_checker,
            "feature_extractor": _load_feature_extractor(bundle),
            "requires_safety_checker": safety_checker is not None,
        }
        return cls(**arguments)

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Self:
        """Return a pipeline on the engines of another one of ours; calls of both take turns, see ``fork``.

        Args:
            pipeline: a pipeline of ours.
            **components: components in place of its own, such as ``scheduler``.

        Raises:
            UnsupportedOptionError: it is a pipeline of diffusers, whose models are no engines.
        """
        pipe = cls(**{**pipeline.components, "requires_safety_checker": False, **components})
        pipe._check_loaded()
        return pipe

    def fork(self) -> Self:
        """Return a second pipeline on the same engines, which are not loaded again.

        Its pictures are drawn together with those of this one. Where engines cannot be called by several threads at
        once (TensorRT, CUDA graphs, ``low_memory``), calls of all forks take turns.
        """
        self._check_loaded()
        loaded, models = self._loaded, self.components  # type: ignore[attr-defined]
        engines = {name: models[name].engine for name in ("vae", "text_encoder", "unet", "controlnet")}
        turn = Turn() if loaded.concurrent else self.unet.turn  # type: ignore[attr-defined]
        # The tokenizer, too: while it works, it holds how the call wants its padding.
        own = {name: copy.deepcopy(models[name]) for name in ("scheduler", "tokenizer")}
        own |= stand_ins(loaded, engines, turn)
        pipe = type(self)(**{**models, **own, "requires_safety_checker": models["safety_checker"] is not None})
        pipe._condition = self._condition
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))  # type: ignore[attr-defined]
        return pipe

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process load the bundle again; what was set afterwards, such as a scheduler, does not travel."""
        self._check_loaded()
        options = {**self._loaded.options(), "device": str(self.device)}
        return _reopened, (type(self), str(self.bundle.path.resolve()), options)

    @property
    def condition(self) -> Condition:
        """Scores the pictures; set one with other options if the control maps were extracted with them."""
        if self._condition is None:
            self._condition = self.bundle.condition()
        return self._condition

    @condition.setter
    def condition(self, value: Condition) -> None:
        self._condition = value

    @property
    def _loaded(self) -> Loaded:
        return self.unet.loaded  # type: ignore[attr-defined,no-any-return]

    def _check_loaded(self) -> None:
        """Refuse to work on models that are no engines of ours, or that another process has loaded.

        Raises:
            UnsupportedOptionError: they are.
        """
        if not isinstance(self.unet, EngineUNet):  # type: ignore[attr-defined]
            raise UnsupportedOptionError(
                f"{type(self).__name__} draws with a bundle's engines, and these are models of another kind. Load a "
                "bundle: from_pretrained(BUNDLE). For a model of diffusers, build one: icexport build --model ..."
            )
        if self._loaded.process != os.getpid():
            raise UnsupportedOptionError(
                "The bundle was loaded before this process was forked, and the threads of its engines did not come "
                "along. Load it in each process, or start processes with the method 'spawn'."
            )

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Let one call at a time go on.

        Raises:
            UnsupportedOptionError: see ``_check_loaded``.
            UsageError: the pipeline was called from within its own call.
        """
        self._check_loaded()
        with self.unet.turn:  # type: ignore[attr-defined]
            yield

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
        self.register_modules(**load_models(was.bundle, was.backend, device, *options))  # type: ignore[attr-defined]
        if self.safety_checker is not None:  # type: ignore[attr-defined]
            self.safety_checker.to(device)  # type: ignore[attr-defined]
        return self

    def _refuse(self, options: Mapping[str, Any], unknown: Collection[str]) -> None:
        """Refuse options that a fixed graph cannot express, and arguments that nobody knows."""
        for name, value in options.items():
            if value is not None:
                raise UnsupportedOptionError(f"{name} is not supported: {_UNSUPPORTED[name]}.")
        if names := sorted(set(unknown) - {"callback", "callback_steps"}):
            raise TypeError(f"{type(self).__name__}() got unknown arguments: {', '.join(names)}")

    def _check_embeds(self, **given: Tensor | None) -> None:
        """Refuse embeddings that do not fit the exported graphs.

        Raises:
            UsageError: they do not.
        """
        config, text = self.bundle.manifest.configs["text_encoder"], self.bundle.manifest.profile.text
        own, width = config["max_position_embeddings"], config["hidden_size"]
        length = text or SizeRange(own, own, own)
        for name, embeds in given.items():
            if embeds is not None and not (
                embeds.ndim == 3 and embeds.shape[1] in length and embeds.shape[2] == width
            ):
                raise UsageError(
                    f"{name} has shape {tuple(embeds.shape)}: the bundle takes [B,S,{width}], S = {length} tokens. "
                    f"For others, build with --text-length {own}:{own}:{3 * own}, or pad them as encode_prompt does."
                )

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
        image = as_pictures(image, size=size)
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
            low = self._loaded.low_memory
            needs.check(maps.shape[2], maps.shape[3], pictures, low_memory=low, opened=not low)
        each = maps.expand(pictures, -1, -1, -1) if len(maps) == 1 else maps.repeat_interleave(per_prompt, dim=0)
        return maps, each

    def _check_score(self, control_maps: Tensor) -> None:
        """Let missing weights of the condition's extractor show now, and not after the work."""
        if not self._can_score:
            self.condition.extract_batch(control_maps[:1])
            self._can_score = True

    def _watch(self, control_maps: Tensor, steps: bool | Collection[int], calls: int) -> FidelityMonitor | None:
        """Return what reads the control back while a picture is drawn; None: nothing can, or nothing is to.

        Args:
            control_maps: control maps ``[b,3,H,W]`` in [0,1].
            steps: True for every UNet call, or the 0-based calls to read; False: none.
            calls: how often the UNet will be called.

        Raises:
            UsageError: a call to read will not be made.
        """
        if steps is False:
            return None
        chosen = range(calls) if steps is True else sorted(set(steps))
        if wrong := [index for index in chosen if index not in range(calls)]:
            raise UsageError(
                f"check_fidelity={wrong}: the UNet is called {calls} times here, and these calls are 0 to {calls - 1}."
            )
        probe = self._loaded.probe
        if probe is None:
            return None
        config = ProbeConfig.from_dict(self.bundle.manifest.configs["probe"])
        return FidelityMonitor(probe, config, control_maps, chosen, kernels=self._loaded.probe_kernels)

    def _count_calls(self, steps: int, timesteps: list[int] | None, sigmas: list[float] | None) -> int:
        """Return how often the UNet is called; some schedulers call it more than once a step."""
        scheduler = copy.deepcopy(self.scheduler)  # type: ignore[attr-defined]
        found, _ = retrieve_timesteps(scheduler, steps, self.device, timesteps, sigmas)
        return len(found)

    def _report(self, scores: list[float] | None, monitors: Sequence[FidelityMonitor]) -> FidelityReport:
        steps, heat_map = finished(monitors)
        return FidelityReport(
            condition=self.condition.name,
            metric=self.condition.metric,
            unit=self.condition.unit,
            higher_is_better=self.condition.higher_is_better,
            scores=scores,
            steps=steps,
            heat_map=None if heat_map is None else heat_map.numpy(),
            expected=monitors[0].expected if monitors else 0,
        )


def _reopened(kind: type[Controlled], bundle: str, options: dict[str, Any]) -> Controlled:
    return kind.from_pretrained(bundle, **options)


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
