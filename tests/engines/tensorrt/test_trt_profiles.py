"""Which profile a plan runs with, and shapes that none of them allows."""

from __future__ import annotations

import pytest
import torch

from engines.errors import ShapeError
from tests.engines.tensorrt.plan_double import RANGE, STREAM, Bench, inputs, static

pytestmark = pytest.mark.tensorrt


@pytest.mark.parametrize(("batch", "profile"), [(1, 1), (2, 2), (3, 0), (4, 0)])
def test_the_narrowest_profile_that_fits_is_used(bench: Bench, batch: int, profile: int) -> None:
    engine = bench.engine([RANGE, static(1), static(2)])
    engine(inputs(batch))
    assert bench.library.called("IExecutionContext.set_optimization_profile_async") == [(profile, STREAM)]


def test_shapes_outside_of_all_profiles_are_refused_with_what_is_allowed(bench: Bench) -> None:
    engine = bench.engine([RANGE, static(8)])
    with pytest.raises(ShapeError) as caught:
        engine(inputs(5))
    for part in ("'unet'", "x [5, 2, 3]", "x [1..4, 2, 3] or x [8, 2, 3]", "icexport build", "min:opt:max"):
        assert part in str(caught.value)
    with pytest.raises(ShapeError, match="expected"):
        engine({"x": torch.zeros(1, 2, 4), "step": torch.tensor(0.0)})


def test_a_plan_of_fixed_shapes_needs_no_profile(bench: Bench) -> None:
    shapes = {"x": (2, 2, 3), "step": (), "y": (2, 2, 3), "tap": (2, 5)}
    engine = bench.engine([static(2)], shapes)
    assert torch.equal(engine(inputs(2))["y"], inputs(2)["x"] + 1)
    assert not bench.library.called("ICudaEngine.get_tensor_profile_shape")
    with pytest.raises(ShapeError, match="not built for x"):
        engine(inputs(1))
