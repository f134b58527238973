"""Reward extractors: a condition's control map read from pixels with a gradient, and the map that it should be."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from icexport.conditions import Canny, Condition, Depth, Hed
from icexport.conditions.canny import MAX_MAGNITUDE
from icexport.conditions.depth import predict
from icexport.errors import UnsupportedOptionError, UsageError
from icexport.fidelity.normalise import control_target

logger = logging.getLogger(__name__)

CANNY_BLUR = 1.0
"""Standard deviation of the blur before the gradient, in pixels, as in ControlNet++."""


class RewardExtractor:
    """Reads the maps that the reward compares: in this form, those of the condition itself.

    Args:
        condition: the condition; its ``extract_batch`` passes gradients on.
    """

    def __init__(self, condition: Condition) -> None:
        self.condition = condition

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return maps ``[B,1,H,W]`` float32 of ``pixels`` ``[B,3,H,W]`` in [0,1], differentiable."""
        # Float32 even inside autocast: bfloat16 pixels tie with their neighbours, and the finest lines get lost.
        with torch.autocast(pixels.device.type, enabled=False):
            return self._read(pixels.float())

    @torch.no_grad()
    def target(self, control: Tensor, pixels: Tensor | None) -> Tensor:
        """Return what the maps should be, without a gradient.

        Args:
            control: control maps ``[B,3,H,W]`` in [0,1].
            pixels: pictures ``[B,3,H,W]`` in [0,1] that the control maps belong to, if they are there.

        Returns:
            ``[B,1,H,W]`` float32.

        Raises:
            UsageError: this condition's target is read from the pictures, and there are none.
        """
        return self._target(control, pixels)

    def blank(self, target: Tensor) -> Tensor:
        """Return ``[B]`` bool: targets that say nothing, which `training.tasks.losses.reward_loss` has to skip."""
        return torch.zeros(len(target), dtype=torch.bool, device=target.device)

    def _read(self, pixels: Tensor) -> Tensor:
        return self.condition.extract_batch(pixels)[:, :1]

    def _target(self, control: Tensor, pixels: Tensor | None) -> Tensor:
        return control.float().mean(1, keepdim=True)


class _CannyReward(RewardExtractor):
    """Edge strength after non-maximum suppression, in units of the Sobel gradient, for pictures as for targets.

    In these units a weight means about what it means in ControlNet++, whose maps are not scaled to [0,1] either.
    """

    def __init__(self, condition: Canny) -> None:
        super().__init__(condition.with_options(soft=True, blur_sigma=CANNY_BLUR))

    def _read(self, pixels: Tensor) -> Tensor:
        return MAX_MAGNITUDE * super()._read(pixels)

    def _target(self, control: Tensor, pixels: Tensor | None) -> Tensor:
        if pixels is None:
            raise UsageError(
                "The canny reward compares edge strengths, which control maps do not hold: the batch needs the "
                "pictures. Train on a data set with pictures, or set the reward's weight alpha to 0."
            )
        return self(pixels)


class _LegacyHedReward(RewardExtractor):
    """HED cast to 8 bits, as in the published code of this family: a reward without a gradient."""

    def _read(self, pixels: Tensor) -> Tensor:
        return _cast_to_8bit(super()._read(pixels))

    def _target(self, control: Tensor, pixels: Tensor | None) -> Tensor:
        return _cast_to_8bit(super()._target(control, pixels))


class _DepthReward(RewardExtractor):
    """Inverse depth over each picture's maximum; unlike the condition's maps, the minimum stays where it is."""

    condition: Depth

    def _read(self, pixels: Tensor) -> Tensor:
        depth, metric = predict(pixels, self.condition.model)
        if metric:
            raise UnsupportedOptionError(
                f"The depth model {self.condition.model} gives distances. The depth reward divides inverse depth by "
                "its maximum: choose a model of relative depth."
            )
        return control_target(F.interpolate(depth, pixels.shape[-2:], mode="bicubic"), "max")[0]

    def _target(self, control: Tensor, pixels: Tensor | None) -> Tensor:
        return control_target(control, "max")[0]

    def blank(self, target: Tensor) -> Tensor:
        return target.amax((1, 2, 3)) < 1  # a target that was divided by its own maximum has a maximum of exactly 1


def reward_extractor(condition: Condition, legacy: bool = False) -> RewardExtractor:
    """Return the reward's extractor for a condition.

    Args:
        condition: the condition; for canny the maps are edge strength before thresholds, of pictures and of targets
            alike (ControlNet++); for depth inverse depth over its maximum; for others the condition's own maps.
        legacy: for hed: whether to cast the maps to 8 bits as the published code does, to reproduce it. Nothing is
            learnt from such a reward, and a warning says so.

    Raises:
        UsageError: ``legacy`` was asked for another condition.
    """
    if legacy and not isinstance(condition, Hed):
        raise UsageError(f"The legacy reward exists for hed only, not for {condition.name}: leave legacy_hed out.")
    if legacy:
        logger.warning(
            "The legacy HED reward is rounded to 8 bits and has no gradient: it is logged, but teaches nothing."
        )
        return _LegacyHedReward(condition)
    if isinstance(condition, Canny):
        return _CannyReward(condition)
    if isinstance(condition, Depth):
        return _DepthReward(condition)
    return RewardExtractor(condition)


def _cast_to_8bit(maps: Tensor) -> Tensor:
    return (255 * maps).clamp(0, 255).byte().float() / 255
