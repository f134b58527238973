"""Triton kernel of ``residual_mix``: two GroupNorms, a resize, ReLU and the weighted sum over taps.

Needs Triton. Programs share the groups as in ``resize_group_norm_relu``: each takes the statistics of main and of the
shortcut for its whole group, then writes its part of the result.

With e bytes an element, s = h w and S = H W, the least traffic is ``e (3 B P S + B P s + 4 P)`` bytes, and the work is
about ``12 B P S`` FLOPs, with ``9 B P S`` more for a resize, and for the GroupNorm of the shortcut ``3 B P S`` and its
statistics, ``30 B P s`` of a resized map, else ``4 B P s``. Main is read again by each of the programs of a group,
from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels import tuning
from engines.kernels.device import map_statistics, neighbour, resized_statistics, sample, source_position
from engines.kernels.host import check_indexable

NAME = "residual_mix"


@triton.jit(do_not_specialize=["index"])  # the taps share one compiled kernel
def residual_mix_fwd_kernel(
    accumulated_ptr,  # in [B, P, height, width]
    main_ptr,  # in [B, P, height, width]
    skip_ptr,  # in [B, skip_channels, in_height, in_width]
    main_gamma_ptr,  # in [P]
    main_beta_ptr,  # in [P]
    skip_gamma_ptr,  # in [P]
    skip_beta_ptr,  # in [P]
    mix_ptr,  # in [L]
    index,  # i32
    skip_channels,  # i32
    first_channel,  # i32
    in_height,  # i32
    in_width,  # i32
    height,  # i32
    width,  # i32
    pixels,  # i32, height * width
    out_ptr,  # out [B, P, height, width]
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one group: P / GROUPS
    EPS: tl.constexpr,
    RESIZE: tl.constexpr,  # False only if in_height, in_width = height, width
    NORMALISE: tl.constexpr,  # whether the shortcut has a GroupNorm
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Write every ``num_programs(1)``-th block of pixels of one group. Grid: (B * GROUPS, any number)."""
    batch = (tl.program_id(0) // GROUPS).to(tl.int64)
    first = (tl.program_id(0) % GROUPS) * CHANNELS
    in_pixels = in_height * in_width if RESIZE else pixels  # how aligned a product is, the compiler cannot know
    group = (batch * (GROUPS * CHANNELS) + first) * pixels
    skip_group_ptr = skip_ptr + (batch * skip_channels + first_channel + first) * in_pixels
    mean, rstd = map_statistics(main_ptr + group, pixels * CHANNELS, EPS, ROWS)
    skip_mean, skip_rstd = 0.0, 1.0
    if NORMALISE:
        if RESIZE:
            skip_mean, skip_rstd = resized_statistics(
                skip_group_ptr, in_height, in_width, height, width, CHANNELS, EPS, BLOCK_C, CELLS
            )
        else:
            skip_mean, skip_rstd = map_statistics(skip_group_ptr, pixels * CHANNELS, EPS, ROWS)

    weight = tl.load(mix_ptr + index).to(tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(pixels, BLOCK_P), tl.num_programs(1)):
        pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
        if RESIZE:
            row = pixel // width
            y, weight_y = source_position(row, in_height, height)
            x, weight_x = source_position(pixel - row * width, in_width, width)
            source = y * in_width + x
        for start in range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            known = channel < CHANNELS
            mask = known[:, None] & (pixel < pixels)[None, :]
            offset = channel[:, None] * pixels + pixel[None, :]
            if RESIZE:
                shortcut = sample(
                    skip_group_ptr,
                    channel[:, None] * in_pixels + source[None, :],
                    mask,
                    neighbour(in_width),
                    neighbour(in_height) * in_width,
                    weight_x[None, :],
                    weight_y[None, :],
                )
            else:
                shortcut = tl.load(skip_group_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            if NORMALISE:
                gamma = tl.load(skip_gamma_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
                beta = tl.load(skip_beta_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
                shortcut = (shortcut - skip_mean) * (skip_rstd * gamma)[:, None] + beta[:, None]
            gamma = tl.load(main_gamma_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
            beta = tl.load(main_beta_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
            value = tl.load(main_ptr + group + offset, mask=mask, other=0.0).to(tl.float32)
            value = (value - mean) * (rstd * gamma)[:, None] + beta[:, None] + shortcut
            before = tl.load(accumulated_ptr + group + offset, mask=mask, other=0.0).to(tl.float32)
            result = before + weight * tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(out_ptr + group + offset, result.to(out_ptr.dtype.element_ty), mask=mask)


KERNEL = residual_mix_fwd_kernel


def launch(
    accumulated: Tensor,
    main: Tensor,
    skip: Tensor,
    main_gamma: Tensor,
    main_beta: Tensor,
    skip_gamma: Tensor,
    skip_beta: Tensor,
    mix: Tensor,
    index: int,
    first_channel: int,
    num_groups: int,
    eps: float,
    normalise_skip: bool,
    out: Tensor,
) -> None:
    """Fill out ``[B,P,H,W]`` from contiguous tensors, shaped as the operator wants them."""
    batch, channels, height, width = out.shape
    check_indexable(NAME, channels // num_groups * max(height * width, skip.shape[2] * skip.shape[3]))
    config = tuning.choose(NAME, tuning.capability(main), batch * num_groups, main.element_size())
    with torch.cuda.device_of(main):
        KERNEL[batch * num_groups, config.split](
            accumulated,
            main,
            skip,
            main_gamma,
            main_beta,
            skip_gamma,
            skip_beta,
            mix,
            index,
            skip.shape[1],
            first_channel,
            skip.shape[2],
            skip.shape[3],
            height,
            width,
            height * width,
            out,
            GROUPS=num_groups,
            CHANNELS=channels // num_groups,
            EPS=eps,
            RESIZE=skip.shape[2:] != out.shape[2:],
            NORMALISE=normalise_skip,
            **config.constants,
            **config.options,
        )
