"""Triton kernel of ``fidelity_reduce``: each program sums the errors of one block of pixels.

Needs Triton. The sums of the blocks are added by torch, in float64: always in one order, without atomics.

The least traffic is ``4 b (C h w + 3 H W)`` bytes plus 16 bytes for each block, and the work is about
``b H W (9 C + 12)`` FLOPs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels import tuning
from engines.kernels.device import neighbour, sample, source_position

NAME = "fidelity_reduce"


@triton.jit
def fidelity_reduce_fwd_kernel(
    reading_ptr,  # in [b, CHANNELS, in_height, in_width]
    target_ptr,  # in [b, 3, height, width]
    in_height,  # i32
    in_width,  # i32
    height,  # i32
    width,  # i32
    pixels,  # i32, height * width
    sums_ptr,  # out [b, blocks, 2] fp32: sum |e|, sum e^2
    CHANNELS: tl.constexpr,  # 1 or 3
    BLOCK: tl.constexpr,
):
    """Sum one block of pixels of one sample. Grid: (blocks, b)."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    batch = tl.program_id(1).to(tl.int64)
    row = pixel // width
    y, weight_y = source_position(row, in_height, height)
    x, weight_x = source_position(pixel - row * width, in_width, width)
    in_pixels = in_height * in_width
    sample_ptr = reading_ptr + batch * CHANNELS * in_pixels
    source = y * in_width + x
    right, below = neighbour(in_width), neighbour(in_height) * in_width
    target_ptrs = target_ptr + batch * 3 * pixels + pixel
    absolute = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    reading = sample(sample_ptr, source, mask, right, below, weight_x, weight_y)
    for channel in tl.static_range(3):
        if CHANNELS == 3 and channel > 0:
            reading = sample(sample_ptr, source + channel * in_pixels, mask, right, below, weight_x, weight_y)
        target = tl.load(target_ptrs + channel * tl.cast(pixels, tl.int64), mask=mask, other=0.0)
        error = tl.where(mask, reading - target, 0.0)
        absolute += tl.abs(error)
        square += error * error
    sums_ptrs = sums_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(sums_ptrs, tl.sum(absolute, 0))
    tl.store(sums_ptrs + 1, tl.sum(square, 0))


KERNEL = fidelity_reduce_fwd_kernel


def launch(reading: Tensor, target: Tensor, out: Tensor) -> None:
    """Fill out ``[b,2]`` with the error sums of contiguous reading ``[b,1 or 3,h,w]`` and target ``[b,3,H,W]``."""
    batch, _, height, width = target.shape
    pixels = height * width
    config = tuning.choose(NAME, tuning.capability(reading), batch * pixels, reading.element_size())
    blocks = triton.cdiv(pixels, config.constants["BLOCK"])
    sums = target.new_empty((batch, blocks, 2))
    with torch.cuda.device_of(reading):
        KERNEL[blocks, batch](
            reading,
            target,
            reading.shape[2],
            reading.shape[3],
            height,
            width,
            pixels,
            sums,
            CHANNELS=reading.shape[1],
            **config.constants,
            **config.options,
        )
    out.copy_(sums.double().sum(1))
