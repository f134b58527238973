"""The depth network of the reference model, so that ``--cond depth`` works without a download. It knows rooms only."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

SIDE = 64


def new_estimator() -> DPTForDepthEstimation:
    """Return an untrained DPT (a vision transformer with a convolutional decoder) for pictures of 64 x 64 px."""
    return DPTForDepthEstimation(
        DPTConfig(
            image_size=SIDE,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=384,
            is_hybrid=False,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[24, 48, 96, 96],
            reassemble_factors=[2, 1, 0.5, 0.25],
            fusion_hidden_size=32,
            use_auxiliary_head=False,
        )
    )


def image_processor() -> DPTImageProcessorPil:
    """Return how pictures are prepared for `new_estimator`: 64 x 64 px, levels in [-1,1]."""
    return DPTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, keep_aspect_ratio=False, ensure_multiple_of=1, resample=3,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


class Estimator(nn.Module):
    """`new_estimator` behind its processor: pictures ``[B,3,64,64]`` in [0,1] -> depth ``[B,64,64]``."""

    def __init__(self, model: DPTForDepthEstimation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Read the depth."""
        depth: Tensor = self.model((pixels - 0.5) / 0.5).predicted_depth
        return depth
