"""Bootstrap intervals over conditions: the pictures of one condition share its difficulty and stay together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from icexport.errors import UsageError

RESAMPLES = 10_000
CHUNK = 1 << 22
"""Drawn indices that are held at once."""


def bootstrap_mean(
    values: ArrayLike, ids: Sequence[Hashable] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the mean over pictures, and its 95 % percentile interval when conditions are drawn again.

    Args:
        values: ``[N]``, one finite number a picture.
        ids: the condition of each picture; None: each is its own.
        seed: seed of the resampling.
        resamples: number of resamples.

    Returns:
        Mean, low end, high end. With fewer than two conditions the ends are NaN.

    Raises:
        UsageError: there is nothing to average, values are not finite, or the number of ids is another.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979; clusters as in Davison and Hinkley, 1997,
    section 3.8.
    """
    numbers = np.asarray(values, dtype=np.float64)
    names = range(len(numbers)) if ids is None else ids
    if numbers.ndim != 1 or not len(numbers) or len(names) != len(numbers) or not np.isfinite(numbers).all():
        raise UsageError(
            f"A bootstrap needs a list of finite numbers and as many ids, got shape {numbers.shape}, {len(names)} ids "
            f"and {np.count_nonzero(~np.isfinite(numbers))} values that are not finite."
        )
    place: dict[Hashable, int] = {}
    group = np.array([place.setdefault(name, len(place)) for name in names])
    sums, counts = np.bincount(group, numbers), np.bincount(group)
    mean = float(numbers.mean())
    if len(place) < 2:
        return mean, math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, step := max(1, CHUNK // len(place))):
        index = rng.integers(len(place), size=(min(step, resamples - start), len(place)))
        drawn.append(sums[index].sum(1) / counts[index].sum(1))
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return mean, float(low), float(high)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    ids: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the mean of ``a - b`` over pictures made of the same conditions and seeds, and its 95 % interval.

    Args:
        a: values ``[N]``.
        b: values ``[N]`` in the same order.
        ids: see `bootstrap_mean`, as for the other arguments, result and errors.
        resamples: number of resamples.
        seed: seed of the resampling.

    Raises:
        UsageError: ``a`` and ``b`` have different lengths.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise UsageError(f"Pairs need equal lengths, got {a.shape} and {b.shape}.")
    return bootstrap_mean(a - b, ids, seed, resamples)
