"""What all engines refuse, and how they say it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from engines.base import Availability, Engine, TensorSpec, as_device, check_inputs, require_device, select_outputs
from engines.errors import BackendUnavailableError, EngineError, ShapeError

SPECS = (
    TensorSpec("sample", torch.float32, ("batch", 4, "height")),
    TensorSpec("timestep", torch.int64, ("batch",)),
    TensorSpec("image", torch.float32, ("batch", 3, "8*height")),
    TensorSpec("mask", torch.bool, ("batch", 1, "8*height")),
)
ENGINE = cast(
    "Engine",
    SimpleNamespace(name="unet", backend="torch", device=torch.device("cpu"), inputs=SPECS, outputs=SPECS[:2]),
)


def inputs() -> dict[str, torch.Tensor]:
    return {
        "mask": torch.zeros(2, 1, 64, dtype=torch.bool),
        "image": torch.zeros(2, 3, 64),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "sample": torch.zeros(2, 4, 8),
    }


def test_fitting_inputs_come_back_in_the_order_of_the_specs() -> None:
    given = inputs()
    got = check_inputs(ENGINE, given)
    assert all(tensor is given[spec.name] for spec, tensor in zip(SPECS, got, strict=True))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("sample", torch.zeros(2, 4, 8).half(), "sample: dtype float16, expected float32"),
        ("sample", torch.zeros(2, 4, 8, device="meta"), "sample: on meta, expected cpu"),
        ("sample", torch.zeros(2, 4), "sample: shape [2, 4], expected [batch, 4, height]"),
        ("sample", torch.zeros(2, 5, 8), "sample: shape [2, 5, 8], expected [batch, 4, height]"),
        ("timestep", torch.zeros(3, dtype=torch.int64), "timestep: batch is 3, but 2 in sample"),
        ("mask", torch.zeros(2, 1, 63, dtype=torch.bool), "mask: 8*height is 63, but 64 in image"),
    ],
)
def test_one_misfit(name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        check_inputs(ENGINE, inputs() | {name: tensor})
    assert message in str(caught.value)


def test_all_problems_at_once() -> None:
    given = inputs()
    del given["mask"], given["timestep"]
    with pytest.raises(ShapeError) as caught:
        check_inputs(ENGINE, given | {"image": torch.zeros(1), "latents": torch.zeros(1)})
    for part in ("graph 'unet' (torch)", "missing: timestep", "missing: mask: bool", "unexpected: latents", "image:"):
        assert part in str(caught.value)


def test_outputs_default_to_all_and_lose_repetitions() -> None:
    assert select_outputs(ENGINE, None) == ("sample", "timestep")
    assert select_outputs(ENGINE, ["timestep", "sample", "timestep"]) == ("timestep", "sample")


@pytest.mark.parametrize(("names", "message"), [(["taps", "eps"], "taps, eps"), ([], "empty")])
def test_outputs_that_do_not_exist(names: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=rf"{message}.*sample, timestep"):
        select_outputs(ENGINE, names)


def test_a_cuda_device_has_an_index() -> None:
    assert as_device("cuda") == torch.device("cuda:0")
    assert as_device("cuda:1") == torch.device("cuda:1")
    assert as_device(torch.device("cpu")) == torch.device("cpu")


def test_an_unusable_device_comes_with_reason_and_fix() -> None:
    availability = Availability(True, "1.0", "no driver", "Install the driver", ("cpu",))
    require_device("torch", availability, "cpu")
    with pytest.raises(BackendUnavailableError, match=r"'torch'.*'cuda'.*usable devices: cpu.*no driver.*Install"):
        require_device("torch", availability, "cuda")
