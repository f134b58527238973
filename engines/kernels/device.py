"""Device functions that the kernels share: bilinear sampling, and GroupNorm statistics of a resized map.

Needs Triton.

The statistics of a map that is resized from h x w to H x W do not need the H x W values. Between four neighbouring
source pixels (a cell) the resized map is ``a + fx dx + fy dy + fx fy dxy``, sampled at a grid of fractions fx, fy that
depends on the geometry alone. Along one axis the fractions of a cell are an arithmetic progression (plus, at the edge,
repeated zeros), so that count, mean and variance of them are known without a loop, and with ``V`` for the variances:

    mean of the cell     = a + E[fx] dx + E[fy] (dy + E[fx] dxy)
    variance of the cell = V[fx] (dx + E[fy] dxy)^2 + V[fy] (dy + E[fx] dxy)^2 + V[fx] V[fy] dxy^2

All terms are squares: nothing cancels. Cells are merged with the pairwise update of Chan, Golub and LeVeque (1983).
The result is that of the resized map up to rounding, for h w instead of H W positions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def neighbour(in_size):
    """Return the distance from a position of ``source_position`` to the next one: 1, or 0 if there is no other."""
    return tl.minimum(in_size - 1, 1)


@triton.jit
def source_position(position, in_size, size):
    """Find where a bilinear resize from in_size to size reads for an output position.

    Returns:
        Index of the lower of two neighbours, and the weight of the upper one: 1 behind the last one.
    """
    scale = tl.div_rn(tl.cast(in_size, tl.float32), tl.cast(size, tl.float32))
    at = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    lower = tl.maximum(tl.minimum(at.to(tl.int32), in_size - 2), 0)
    return lower, tl.minimum(at - lower.to(tl.float32), 1.0)


@triton.jit
def _corners(base_ptr, offset, mask, right, below):
    """Load the elements at base_ptr + offset, on their right, below, and below on their right, in float32."""
    a = tl.load(base_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base_ptr + (offset + right), mask=mask, other=0.0).to(tl.float32)
    c = tl.load(base_ptr + (offset + below), mask=mask, other=0.0).to(tl.float32)
    d = tl.load(base_ptr + (offset + below + right), mask=mask, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def sample(base_ptr, offset, mask, right, below, weight_x, weight_y):
    """Interpolate bilinearly in float32 between the elements at base_ptr + offset and their neighbours.

    Offsets, of the neighbours too, are 32-bit numbers: pointers would take twice the registers.
    """
    a, b, c, d = _corners(base_ptr, offset, mask, right, below)
    # As differences: a constant map stays exactly constant.
    upper = a + weight_x * (b - a)
    lower = c + weight_x * (d - c)
    return upper + weight_y * (lower - upper)


@triton.jit
def _fractions(cell, in_size, size):
    """Return count, mean and variance of the fractions of outputs between source positions cell and cell + 1."""
    # Position o reads at ((2 o + 1) in_size - size) / (2 size): at or after ``cell`` from this o on.
    first = ((2 * cell + 1) * size + in_size - 1) // (2 * in_size)
    end = tl.where(cell + 1 < in_size, ((2 * cell + 3) * size + in_size - 1) // (2 * in_size), size)
    edge = tl.where(cell == 0, first, 0).to(tl.float32)  # positions before the first source pixel read that pixel
    # Behind the last source pixel the fraction does not matter: both neighbours are that pixel.
    count = (end - first).to(tl.float32)
    step = tl.div_rn(tl.cast(in_size, tl.float32), tl.cast(size, tl.float32))
    numerator = ((2 * first + 1) * in_size - (2 * cell + 1) * size).to(tl.float32)
    mean = numerator / (2.0 * size) + 0.5 * (count - 1.0) * step
    variance = step * step * (count * count - 1.0) / 12.0
    total = tl.maximum(count + edge, 1.0)
    inner, outer = count / total, edge / total
    return count + edge, mean * inner, inner * (variance + outer * mean * mean)


@triton.jit
def _merge(count, mean, m2, more, more_mean, more_m2):
    """Return count, mean and sum of squared deviations of two sets together; a set may be empty."""
    total = count + more
    weight = more / tl.maximum(total, 1.0)
    delta = more_mean - mean
    return total, mean + delta * weight, m2 + more_m2 + delta * delta * count * weight


@triton.jit
def _finish(count, mean, m2, EPS: tl.constexpr):
    """Compute mean and 1 / standard deviation of all lanes together."""
    total = tl.sum(count)
    # The sum of large equal means is inexact; a second look at what is left over makes the mean exact to rounding.
    guess = tl.sum(mean * count) / total
    offset = mean - guess
    rest = tl.sum(offset * count) / total
    variance = tl.sum(m2 + count * offset * offset) / total - rest * rest
    return guess + rest, tl.rsqrt(tl.maximum(variance, 0.0) + EPS)


@triton.jit
def map_statistics(
    group_ptr,
    size,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute mean and 1 / standard deviation of the ``size`` elements from group_ptr on.

    Each thread takes eight neighbours at a time: their mean, then their squared deviations, then one merge.
    """
    row = tl.arange(0, ROWS) * 8
    count = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    m2 = tl.zeros([ROWS], tl.float32)
    for start in range(0, size, ROWS * 8):
        offset = start + row[:, None] + tl.arange(0, 8)[None, :]
        mask = offset < size
        value = tl.load(group_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        more = tl.minimum(tl.maximum(size - start - row, 0), 8).to(tl.float32)
        more_mean = tl.sum(value, 1) / tl.maximum(more, 1.0)
        deviation = tl.where(mask, value - more_mean[:, None], 0.0)
        count, mean, m2 = _merge(count, mean, m2, more, more_mean, tl.sum(deviation * deviation, 1))
    return _finish(count, mean, m2, EPS)


@triton.jit
def resized_statistics(
    group_ptr,
    in_height,
    in_width,
    height,
    width,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Compute mean and 1 / standard deviation of CHANNELS maps from group_ptr on, as if resized to height x width."""
    in_pixels = in_height * in_width
    count = tl.zeros([BLOCK_C, CELLS], tl.float32)
    mean = tl.zeros([BLOCK_C, CELLS], tl.float32)
    m2 = tl.zeros([BLOCK_C, CELLS], tl.float32)
    for start in range(0, in_pixels, CELLS):
        cell = start + tl.arange(0, CELLS)
        inside = cell < in_pixels
        y = cell // in_width
        x = cell - y * in_width
        count_y, mean_y, var_y = _fractions(y, in_height, height)
        count_x, mean_x, var_x = _fractions(x, in_width, width)
        positions = count_y * count_x
        right = tl.where(x + 1 < in_width, 1, 0)[None, :]
        below = tl.where(y + 1 < in_height, in_width, 0)[None, :]
        mean_x, mean_y, var_x, var_y = mean_x[None, :], mean_y[None, :], var_x[None, :], var_y[None, :]
        for first in range(0, CHANNELS, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            mask = (channel < CHANNELS)[:, None] & inside[None, :]
            offset = channel[:, None] * in_pixels + cell[None, :]
            a, b, c, d = _corners(group_ptr, offset, mask, right, below)
            dx, dy = b - a, c - a
            dxy = d - c - dx
            slope_x, slope_y = dx + mean_y * dxy, dy + mean_x * dxy
            variance = var_x * slope_x * slope_x + var_y * slope_y * slope_y + var_x * var_y * dxy * dxy
            more = tl.where(mask, positions[None, :], 0.0)
            more_mean = a + mean_x * dx + mean_y * slope_y
            count, mean, m2 = _merge(count, mean, m2, more, more_mean, more * variance)
    return _finish(count, mean, m2, EPS)
