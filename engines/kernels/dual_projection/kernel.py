"""Triton kernel of ``dual_projection``: a matrix product ``[O,C] x [C,hw]`` for each sample, on tensor cores.

Needs Triton. With e bytes an element, the least traffic is ``e (B C hw + O C + B O hw)`` bytes and the work is
``2 B O C hw`` FLOPs. Tiles read x once for each BLOCK_M outputs and the weight once for each BLOCK_N pixels; at the
sizes of a probe both stay in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels import tuning

NAME = "dual_projection"


@triton.jit
def dual_projection_fwd_kernel(
    x_ptr,  # in [B, channels, pixels]
    weight_ptr,  # in [outputs, channels]
    channels,  # i32
    outputs,  # i32
    pixels,  # i32
    out_ptr,  # out [B, outputs, pixels]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile, BLOCK_M outputs x BLOCK_N pixels of one sample. Grid: (tiles, B)."""
    tiles_m = tl.cdiv(outputs, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    sample = tl.program_id(1).to(tl.int64)
    weight_ptrs = weight_ptr + m[:, None].to(tl.int64) * channels + k[None, :]
    x_ptrs = x_ptr + sample * channels * pixels + k[:, None].to(tl.int64) * pixels + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, channels, BLOCK_K):
        weight = tl.load(weight_ptrs, mask=(m[:, None] < outputs) & (k[None, :] < channels - start), other=0.0)
        x = tl.load(x_ptrs, mask=(k[:, None] < channels - start) & (n[None, :] < pixels), other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")  # not tf32: float32 has to stay float32
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K * tl.cast(pixels, tl.int64)
    out_ptrs = out_ptr + (sample * outputs + m[:, None]) * pixels + n[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < outputs) & (n[None, :] < pixels))


KERNEL = dual_projection_fwd_kernel


def launch(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Fill out ``[B,O,h,w]`` from contiguous x ``[B,C,h,w]`` and weight ``[O,C]``."""
    batch, channels, height, width = x.shape
    outputs, pixels = len(weight), height * width
    config = tuning.choose(NAME, tuning.capability(x), batch * pixels, x.element_size())
    tiles = triton.cdiv(outputs, config.constants["BLOCK_M"]) * triton.cdiv(pixels, config.constants["BLOCK_N"])
    with torch.cuda.device_of(x):
        KERNEL[tiles, batch](x, weight, channels, outputs, pixels, out, **config.constants, **config.options)
