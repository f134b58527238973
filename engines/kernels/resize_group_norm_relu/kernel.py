"""Triton kernel of ``resize_group_norm_relu``.

Needs Triton. A few programs share one group of one sample. Each takes the statistics of the whole group, from the
source map (see ``engines.kernels.device``), then writes its part of the result: nothing of size H x W is read, and no
program waits for another.

With e bytes an element, s = h w and S = H W, the least traffic is ``e (B C s + B C S + 2 C + B C)`` bytes, and the
work is about ``B C (30 s + 14 S)`` FLOPs if the map is resized, else ``B C (4 s + 5 S)``. The source map is read again
by each of the programs of a group, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels import tuning
from engines.kernels.device import map_statistics, neighbour, resized_statistics, sample, source_position
from engines.kernels.host import check_indexable

NAME = "resize_group_norm_relu"


@triton.jit
def resize_group_norm_relu_fwd_kernel(
    x_ptr,  # in [B, x_channels, in_height, in_width]
    gamma_ptr,  # in [C]
    beta_ptr,  # in [C]
    shift_ptr,  # in [B, C] if SHIFT_PER_SAMPLE else [1, C]
    x_channels,  # i32
    first_channel,  # i32
    in_height,  # i32
    in_width,  # i32
    height,  # i32
    width,  # i32
    pixels,  # i32, height * width
    out_ptr,  # out [B, C, height, width]
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one group: C / GROUPS
    EPS: tl.constexpr,
    RESIZE: tl.constexpr,  # False only if in_height, in_width = height, width
    SHIFT_PER_SAMPLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Write every ``num_programs(1)``-th block of pixels of one group. Grid: (B * GROUPS, any number)."""
    batch = tl.program_id(0) // GROUPS
    first = (tl.program_id(0) % GROUPS) * CHANNELS
    in_pixels = in_height * in_width if RESIZE else pixels  # how aligned a product is, the compiler cannot know
    group_ptr = x_ptr + (batch.to(tl.int64) * x_channels + first_channel + first) * in_pixels
    if RESIZE:
        mean, rstd = resized_statistics(group_ptr, in_height, in_width, height, width, CHANNELS, EPS, BLOCK_C, CELLS)
    else:
        mean, rstd = map_statistics(group_ptr, pixels * CHANNELS, EPS, ROWS)

    group_out_ptr = out_ptr + (batch.to(tl.int64) * (GROUPS * CHANNELS) + first) * pixels
    shift_row = first
    if SHIFT_PER_SAMPLE:
        shift_row += batch * (GROUPS * CHANNELS)
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
            if RESIZE:
                value = sample(
                    group_ptr,
                    channel[:, None] * in_pixels + source[None, :],
                    mask,
                    neighbour(in_width),
                    neighbour(in_height) * in_width,
                    weight_x[None, :],
                    weight_y[None, :],
                )
            else:
                pointers = group_ptr + channel[:, None] * pixels + pixel[None, :]
                value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            gamma = tl.load(gamma_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
            beta = tl.load(beta_ptr + first + channel, mask=known, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + shift_row + channel, mask=known, other=0.0).to(tl.float32)
            normal = (value - mean) * (rstd * gamma)[:, None] + beta[:, None]
            result = tl.maximum(normal, 0.0, propagate_nan=tl.PropagateNan.ALL) + shift[:, None]
            pointers = group_out_ptr + channel[:, None] * pixels + pixel[None, :]
            tl.store(pointers, result.to(out_ptr.dtype.element_ty), mask=mask)


KERNEL = resize_group_norm_relu_fwd_kernel


def launch(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift: Tensor,
    first_channel: int,
    height: int,
    width: int,
    num_groups: int,
    eps: float,
    out: Tensor,
) -> None:
    """Fill out ``[B,C,H,W]`` from contiguous tensors, shaped as the operator wants them."""
    batch, channels = out.shape[:2]
    check_indexable(NAME, channels // num_groups * max(height * width, x.shape[2] * x.shape[3]))
    config = tuning.choose(NAME, tuning.capability(x), batch * num_groups, x.element_size())
    with torch.cuda.device_of(x):
        KERNEL[batch * num_groups, config.split](
            x,
            gamma,
            beta,
            shift,
            x.shape[1],
            first_channel,
            x.shape[2],
            x.shape[3],
            height,
            width,
            height * width,
            out,
            GROUPS=num_groups,
            CHANNELS=channels // num_groups,
            EPS=eps,
            RESIZE=x.shape[2:] != out.shape[2:],
            SHIFT_PER_SAMPLE=len(shift) > 1,
            **config.constants,
            **config.options,
        )
