"""Bootstrap intervals: they cover what they promise, and conditions stay together."""

from __future__ import annotations

import math

import numpy as np
import pytest

from icexport.errors import UsageError
from training.evaluation.intervals import bootstrap_mean, paired_bootstrap


def test_independent_values_give_the_textbook_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = bootstrap_mean(values)
    error = values.std(ddof=1) / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (mean - low) / error == pytest.approx(1.96, rel=0.05)
    assert (high - mean) / error == pytest.approx(1.96, rel=0.05)


def test_pictures_of_a_condition_stay_together() -> None:
    """Four copies of each condition's value add pictures, but no knowledge."""
    values = np.random.default_rng(0).normal(size=100)
    alone = bootstrap_mean(values, seed=1)
    copied = bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(100), 4).tolist(), seed=1)
    assert copied == pytest.approx(alone)
    mixed = bootstrap_mean(np.repeat(values, 4), seed=1)
    assert (mixed[2] - mixed[1]) < 0.6 * (alone[2] - alone[1])


def test_conditions_of_unequal_size_and_any_order() -> None:
    values, ids = [1.0, 5.0, 3.0, 1.0], ["a", "b", "a", "c"]
    mean, low, high = bootstrap_mean(values, ids)
    assert mean == 2.5
    assert (low, high) == (1, 5)


def test_a_pair_cancels_what_is_common() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=300)
    a, b = common + 0.1 + rng.normal(0, 0.05, 300), common + rng.normal(0, 0.05, 300)
    mean, low, high = paired_bootstrap(a, b, seed=3)
    assert 0.08 < low < mean < high < 0.12
    assert paired_bootstrap(b, a, seed=3) == pytest.approx((-mean, -high, -low))
    assert paired_bootstrap(a, b, seed=3) == (mean, low, high)
    assert paired_bootstrap(a, b, seed=4) != (mean, low, high)


def test_coverage() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        conditions = rng.normal(size=60)
        values = np.repeat(conditions, 3) + rng.normal(0, 0.3, 180)
        _, low, high = bootstrap_mean(values, np.repeat(np.arange(60), 3).tolist(), seed=trial, resamples=500)
        hits += low <= 0 <= high
    assert 0.89 < hits / 200 < 0.985


def test_one_condition_has_no_interval() -> None:
    mean, low, high = bootstrap_mean([1.0, 2.0], ["a", "a"])
    assert mean == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    ("values", "ids"), [([], None), ([1.0, math.nan], None), ([1.0], ["a", "b"]), ([[1.0]], None)]
)
def test_what_cannot_be_averaged(values: list, ids: list | None) -> None:
    with pytest.raises(UsageError, match="finite numbers"):
        bootstrap_mean(values, ids)


def test_pairs_of_unequal_length() -> None:
    with pytest.raises(UsageError, match="equal lengths"):
        paired_bootstrap([1.0, 2.0], [1.0])
