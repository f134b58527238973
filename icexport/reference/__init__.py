"""The embedded reference model: a small but real Stable Diffusion with a canny ControlNet and its probe."""

from __future__ import annotations

from pathlib import Path


def reference_path() -> Path:
    """Return the folder of the reference model, in the ordinary diffusers layout.

    ``StableDiffusionControlNetPipeline.from_pretrained`` loads it: the base model lies at the root, ControlNets and
    probes in ``controlnet-<condition>/`` and ``probe-<condition>/``. 64 x 64 px, fp16 safetensors; ``README.md`` in it
    is the model card.
    """
    return Path(__file__).parent / "model"
