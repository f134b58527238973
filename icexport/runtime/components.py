"""Engines in the clothes of diffusers' models, so that diffusers' own pipeline can drive them.

The denoising loop, the schedulers' quirks, prompt encoding and callbacks then stay diffusers', which is what makes the
pipeline a drop-in: same seed, same scheduler, same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import ControlNetModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from engines.base import Engine
from icexport.errors import UnsupportedOptionError
from icexport.host import memory
from icexport.models.sizes import residual_channels
from icexport.runtime.step import Deferred, StepGraphs
from icexport.runtime.turn import Turn

if TYPE_CHECKING:
    from icexport.runtime.loading import Loaded


class Observer(Protocol):
    """What looks at the outputs of UNet calls."""

    def next_call(self) -> Sequence[str]:
        """Return the names of the outputs that it wants of the next call; none: it does not look at that one."""
        ...

    def __call__(self, timestep: Tensor, outputs: dict[str, Tensor]) -> None:
        """Take the outputs of a call that it wanted some of."""
        ...


class EngineModule(nn.Module):
    """What all stand-ins share: a config, the engine's float dtype and device, and no parameters."""

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.engine = engine
        self._config = FrozenDict({k: v for k, v in config.items() if not k.startswith("_")})

    @property
    def config(self) -> FrozenDict:
        """The model's config."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the engine's outputs."""
        return self.engine.outputs[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self.engine.device


class EngineTextEncoder(EngineModule):
    """``CLIPTextModel`` for ``encode_prompt``."""

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        super().__init__(engine, config)
        # clip_skip: diffusers takes a hidden state and normalises it itself; the graph has done so already.
        self.text_model = SimpleNamespace(final_layer_norm=lambda hidden_states: hidden_states)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> tuple[Any, ...]:
        """Return ``(prompt_embeds [b,S,D],)``, or with hidden states ``(…, states)``; ``states[-(skip + 1)]`` works.

        Raises:
            UnsupportedOptionError: the text encoder wants an attention mask.
        """
        if attention_mask is not None:
            raise UnsupportedOptionError(
                "This text encoder was trained with attention masks (config.use_attention_mask), which the exported "
                "graph does not take. Pass prompt_embeds instead."
            )
        if output_hidden_states:
            return (None, _HiddenStates(lambda skip: self._encode(input_ids, skip), self._config["num_hidden_layers"]))
        return (self._encode(input_ids, 0),)

    def _encode(self, input_ids: Tensor, clip_skip: int) -> Tensor:
        skip = torch.tensor(clip_skip, device=input_ids.device)
        return self.engine({"input_ids": input_ids, "clip_skip": skip})["prompt_embeds"]


class _HiddenStates:
    """The layers' outputs as diffusers takes them from a tuple: last one at -1, each computed when asked for."""

    def __init__(self, encode: Callable[[int], Tensor], layers: int) -> None:
        self._encode = encode
        self._layers = layers

    def __getitem__(self, index: int) -> Tensor:
        if not -self._layers <= index < 0:
            raise UnsupportedOptionError(f"clip_skip must be 0 to {self._layers - 1} for this text encoder.")
        return self._encode(-index - 1)


class EngineControlNet(ControlNetModel):  # type: ignore[misc]
    """A ``ControlNetModel`` without weights: diffusers' pipeline insists on the class.

    Conditioning scale and guess mode become the graph's ``residual_scale`` input.
    """

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)  # not ControlNetModel's, which would build the network
        self.register_to_config(**{k: v for k, v in config.items() if not k.startswith("_")})
        self.engine = engine
        self.step_graphs: StepGraphs | None = None
        self._residuals = residual_channels(config)
        self._scales: dict[tuple[object, ...], Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the engine's outputs."""
        return self.engine.outputs[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self.engine.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = False,
    ) -> tuple[list[Tensor], Tensor | Deferred]:
        """Return down residuals and the middle one, scaled. A scale of 0 (outside the guidance window) runs no engine.

        With ``step_graphs`` the UNet's stand-in computes them, except in guess mode: the pipeline changes them on the
        way.

        Args:
            sample: latents ``[B,4,h,w]``.
            timestep: one timestep for all samples, or one for each, ``[B]``.
            encoder_hidden_states: prompt embeddings ``[B,S,D]``.
            controlnet_cond: control maps ``[B,3,H,W]`` in [0,1].
            conditioning_scale: strength of the control.
            guess_mode: whether control is weaker in shallow layers.
            return_dict: always False.

        Returns:
            The down residuals ``[B,C,h/s,w/s]`` and the middle one; with ``step_graphs`` none and a ``Deferred``.
        """
        batch, _, height, width = sample.shape
        if conditioning_scale == 0:
            zeros = [sample.new_zeros(batch, c, height // s, width // s) for c, s in self._residuals]
            return zeros[:-1], zeros[-1]
        inputs = {
            "sample": sample,
            "timestep": as_timesteps(timestep, sample),
            "prompt_embeds": encoder_hidden_states,
            "control_map": controlnet_cond.to(sample.dtype),
            "residual_scale": self._scale(sample, conditioning_scale, guess_mode),
        }
        if self.step_graphs is not None and not guess_mode:
            return [], Deferred(inputs)
        *down, mid = self.engine(inputs).values()
        return down, mid

    def _scale(self, sample: Tensor, conditioning_scale: float, guess_mode: bool) -> Tensor:
        """Return ``residual_scale [B,R]``; kept, for a copy to the device in every step would wait for it."""
        batch, count = len(sample), len(self._residuals)
        key = (batch, conditioning_scale, guess_mode, sample.dtype, sample.device)
        if key not in self._scales:
            scales = residual_scale(count, conditioning_scale, guess_mode).expand(batch, count)
            self._scales[key] = scales.to(sample.device, sample.dtype)
        return self._scales[key]


class EngineUNet(EngineModule):
    """``UNet2DConditionModel`` for the denoising loop; hands what its observer wants to it."""

    observer: Observer | None = None
    step_graphs: StepGraphs | None = None
    loaded: Loaded
    turn: Turn

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | Deferred | None = None,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: latents ``[B,4,h,w]``.
            timestep: one timestep for all samples, or one for each, ``[B]``.
            encoder_hidden_states: prompt embeddings ``[B,S,D]``.
            down_block_additional_residuals: the ControlNet's down residuals, ``[B,C,h/s,w/s]`` each; empty if the next
                one is ``Deferred``.
            mid_block_additional_residual: the ControlNet's middle residual, likewise.
            timestep_cond: always None, like the two behind it: the pipeline refuses the options that set them.
            cross_attention_kwargs: always None.
            added_cond_kwargs: always None.
            return_dict: always False.

        Returns:
            ``(noise_pred,)``, ``[B,4,h,w]``.

        Raises:
            UnsupportedOptionError: there are no residuals, as in a pipeline without a ControlNet.
        """
        if down_block_additional_residuals is None or mid_block_additional_residual is None:
            raise UnsupportedOptionError(
                "The UNet of a bundle takes the residuals of its ControlNet, which this pipeline does not give it. "
                "Draw with InnerControlPipeline; controlnet_conditioning_scale=0.0 switches the control off."
            )
        time = as_timesteps(timestep, sample)
        inputs = {"sample": sample, "timestep": time, "prompt_embeds": encoder_hidden_states}
        deferred = None
        if isinstance(mid_block_additional_residual, Deferred):
            deferred = mid_block_additional_residual
        else:
            inputs |= {f"down_residual_{i}": r for i, r in enumerate(down_block_additional_residuals)}
            inputs["mid_residual"] = mid_block_additional_residual
        read = self.observer.next_call() if self.observer else ()
        wanted = ["noise_pred", *read]
        found = self.step_graphs(inputs, deferred, wanted) if self.step_graphs else self.engine(inputs, wanted)
        if self.observer and read:
            self.observer(time, found)
        return (found["noise_pred"],)


class EngineVae(EngineModule):
    """``AutoencoderKL`` for decoding."""

    _slicing = False

    def enable_slicing(self) -> None:
        """Decode pictures one by one, which takes the memory of one."""
        self._slicing = True

    def disable_slicing(self) -> None:
        """Decode all pictures of a call at once."""
        self._slicing = False

    def enable_tiling(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: not possible on an engine.

        Raises:
            UnsupportedOptionError: raised always.
        """
        raise UnsupportedOptionError(
            "enable_tiling is not supported: the decoder is one graph for whole pictures. With several pictures in a "
            "call, vae.enable_slicing() decodes them one by one; otherwise draw smaller ones."
        )

    def decode(self, latents: Tensor, return_dict: bool = False, generator: Any = None) -> tuple[Tensor]:
        """Return ``(pixels [b,3,H,W] in [-1,1],)``."""
        memory.release()  # the steps have left gaps, and this is where a picture needs most
        latents = latents.to(self.dtype)
        parts = torch.split(latents, 1) if self._slicing else (latents,)
        return (torch.cat([self.engine({"latents": part})["pixels"] for part in parts]),)


def residual_scale(count: int, scale: float, guess_mode: bool) -> Tensor:
    """Return the factor of each residual, ``[count]``.

    In guess mode, as ``ControlNetModel.forward`` has it: from a tenth at the first residual to all at the last.
    """
    return scale * (torch.logspace(-1, 0, count) if guess_mode else torch.ones(count))


def as_timesteps(timestep: Tensor | float, sample: Tensor) -> Tensor:
    """Return a float32 timestep for each sample, as the graphs take them.

    Args:
        timestep: one for all samples or one for each: schedulers give integers, floats or tensors.
        sample: the samples, ``[B,4,h,w]``.
    """
    return torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1).expand(len(sample))
