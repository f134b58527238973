"""What the pipeline returns beside the pictures."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from icexport.fidelity.report import FidelityReport


@dataclass
class InnerControlPipelineOutput(StableDiffusionPipelineOutput):  # type: ignore[misc]
    """Pictures and their fidelity.

    Attributes:
        images: list of PIL pictures, NumPy array ``[B,H,W,3]`` or tensor ``[B,3,H,W]`` in [0,1], or latents.
        nsfw_content_detected: one flag a picture, or None without a safety checker.
        fidelity: the report, or None if the check was switched off. Read it by attribute: index access follows
            diffusers and drops fields that are None.
    """

    fidelity: FidelityReport | None = None
