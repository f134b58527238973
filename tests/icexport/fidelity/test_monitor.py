from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.base import TensorSpec
from engines.kernels import SPECS
from icexport.errors import UsageError
from icexport.fidelity.monitor import FidelityMonitor
from icexport.fidelity.normalise import normalise
from icexport.models.probe import ProbeConfig


class Probe:
    """An engine that shows the mean of its tap."""

    device = torch.device("cpu")
    inputs = (TensorSpec("tap_0", torch.float32, ("pictures", "c", "rows", "columns")),)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"reading": inputs["tap_0"].mean(1, keepdim=True).expand(-1, 3, -1, -1)}


def outputs(tap: Tensor) -> dict[str, Tensor]:
    return {"tap_0": tap, "time_embedding": torch.zeros(len(tap), 8)}


CONFIG = ProbeConfig((1,), time_embed_dim=None)


def monitor(
    control: Tensor, steps: Collection[int] = range(9), normaliser: Any = "identity", **options: Any
) -> FidelityMonitor:
    return FidelityMonitor(Probe(), replace(CONFIG, normaliser=normaliser), control, steps, **options)


def observe(watch: FidelityMonitor, time: float, found: dict[str, Tensor]) -> None:
    """As the UNet's stand-in does."""
    if wanted := watch.next_call():
        watch(torch.full((len(found["tap_0"]),), time), {name: found[name] for name in wanted})


def test_identity_maps_the_range_to_01() -> None:
    reading = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)

    assert normalise(reading, (-1.0, 1.0), "identity").flatten().tolist() == [0, 0, 0.5, 1, 1]
    assert normalise(reading, (-0.5, 0.5), "identity").flatten().tolist() == [0, 0, 0.5, 1, 1]
    assert normalise(reading.half(), (-1.0, 1.0), "identity").dtype == torch.float32


def test_depth_is_divided_by_its_largest_value() -> None:
    reading = torch.tensor([[-1.0, 0.0], [-0.5, -1.0]])[:, None, None, :].expand(2, 3, 1, 2)

    found = normalise(reading, (-1.0, 1.0), "max")

    assert found.shape == (2, 1, 1, 2)
    torch.testing.assert_close(found.flatten(1), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_lineart_is_stretched_and_inverted() -> None:
    reading = torch.tensor([-0.5, 0.0, 0.5]).reshape(1, 1, 1, 3)

    torch.testing.assert_close(
        normalise(reading, (-1.0, 1.0), "minmax_inverted").flatten(), torch.tensor([1.0, 0.5, 0.0])
    )


@pytest.mark.parametrize("normaliser", ["identity", "max", "minmax_inverted"])
@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_blank_maps_stay_finite(normaliser: str, level: float) -> None:
    found = normalise(torch.full((1, 3, 2, 2), level), (-1.0, 1.0), normaliser)  # type: ignore[arg-type]

    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_last_samples_are_the_conditional_half() -> None:
    control = torch.zeros(1, 3, 4, 4)
    for samples in ([1.0], [-1.0, 1.0]):
        watch = monitor(control)
        observe(watch, 9.0, outputs(torch.tensor(samples).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 2)))
        (reading,), heat = watch.finish()

        assert reading.errors == [1.0]
        assert heat is not None
        assert heat.shape == (1, 2, 2)


def test_errors_are_compared_at_the_size_of_the_control_map() -> None:
    control = torch.zeros(1, 3, 4, 4)
    control[..., :2] = 1
    tap = torch.tensor([1.0, -1.0]).expand(1, 1, 2, 2)  # the same two halves, at half the size
    watch = monitor(control)

    observe(watch, 5.0, outputs(tap))

    (reading,), heat = watch.finish()
    assert 0 < reading.errors[0] < 0.05  # only the border is blurred
    assert (reading.index, reading.timestep) == (0, 5.0)
    assert heat is not None
    assert float(heat.mean()) == pytest.approx(reading.errors[0])


def test_readings_keep_the_number_of_their_call() -> None:
    watch = monitor(torch.zeros(1, 3, 4, 4), {1, 3})
    for time in (900.0, 600.0, 300.0, 0.0):
        observe(watch, time, outputs(torch.zeros(2, 1, 2, 2)))

    assert [(r.index, r.timestep) for r in watch.finish()[0]] == [(1, 600.0), (3, 0.0)]


def test_only_the_calls_to_read_want_taps() -> None:
    watch = monitor(torch.zeros(1, 3, 4, 4), {1})
    assert [watch.next_call() for _ in range(3)] == [[], ["tap_0"], []]

    timed = ProbeConfig((1, 2), time_embed_dim=8)
    assert FidelityMonitor(Probe(), timed, torch.zeros(1, 3, 4, 4), [0]).next_call() == [
        "tap_0",
        "tap_1",
        "time_embedding",
    ]


def test_nothing_read() -> None:
    assert monitor(torch.zeros(1, 3, 4, 4)).finish() == ([], None)


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ran on 3 samples, but there are 2 control maps .*callback_on_step_end"):
        observe(monitor(torch.zeros(2, 3, 4, 4)), 1.0, outputs(torch.zeros(3, 1, 2, 2)))


@pytest.mark.parametrize(
    ("normaliser", "control"),
    [
        ("max", [0.0, 0.2, 0.4]),  # depth: the nearest point has not to be white
        ("minmax_inverted", [0.0, 0.5, 1.0]),  # lineart: white lines on black, and the reading is dark on white
    ],
)
def test_a_perfect_reading_is_without_error(normaliser: str, control: list[float]) -> None:
    maps = torch.tensor(control).reshape(1, 1, 1, 3).expand(1, 3, 2, 3)
    watch = FidelityMonitor(Probe(), replace(CONFIG, normaliser=normaliser), maps, range(2))
    for reading in (maps, 1 - maps):
        observe(watch, 1.0, outputs(2 * reading[:, :1] - 1))
    right, wrong = watch.finish()[0]

    assert right.errors == pytest.approx([0.0], abs=1e-12)
    assert wrong.errors[0] > 0.1


@pytest.mark.parametrize("normaliser", ["identity", "max", "minmax_inverted"])
@pytest.mark.parametrize("size", [(8, 8), (24, 40), (3, 5)])
def test_the_kernel_gives_the_same_readings(normaliser: str, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    control = torch.rand(2, 3, *size, generator=generator)
    taps = [2 * torch.rand(4, 5, 8, 8, generator=generator) - 1 for _ in range(3)]
    found = []
    for kernels in (False, True):
        watch = monitor(control, normaliser=normaliser, kernels=kernels)
        for index, tap in enumerate(taps):
            watch(torch.full((4,), 900.0 - index), outputs(tap))
        found.append(watch.finish())
    (plain, heat), (fused, fused_heat) = found
    assert [(r.index, r.timestep) for r in fused] == [(r.index, r.timestep) for r in plain]
    for one, other in zip(plain, fused, strict=True):
        assert other.errors == pytest.approx(one.errors, rel=1e-5)
    torch.testing.assert_close(fused_heat, heat)
    sums = SPECS["fidelity_reduce"].op(torch.full((1, 1, 2, 2), 0.3), torch.zeros(1, 3, 4, 4))
    assert not torch.allclose(sums[:, 0], sums[:, 1]), "or it would not matter which one is read"
