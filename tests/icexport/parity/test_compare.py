from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from engines.base import TensorSpec
from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.stable_diffusion import unet_graph, vae_decoder_graph
from icexport.models.loading import ModelSource
from icexport.models.precision import PRECISIONS
from icexport.parity.cases import Case, cases
from icexport.parity.compare import (
    COSINE_ERROR,
    MIN_COSINE,
    OutputParity,
    compare,
    cosine,
    relative_error,
    room,
)
from tests.tiny_models import TEXT_LENGTH, tiny_unet

PROFILE = Profile(SizeRange(1, 1, 4), SizeRange(16, 16, 32), SizeRange(16, 16, 32))
CASES = [Case("first", {"x": torch.ones(2)}), Case("second", {"x": torch.tensor([3.0, 4.0])})]


class Engine:
    """Multiplies; ``spoil`` may change what comes out."""

    backend, device = "fake", torch.device("cpu")

    def __init__(self, factor: float = 1.0, dtype: torch.dtype = torch.float32, spoil: object = None) -> None:
        self.name = "fake"
        self.inputs = (TensorSpec("x", dtype, (2,)),)
        self.outputs = (TensorSpec("y", dtype, (2,)),)
        self.factor, self.spoil = factor, spoil

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        assert inputs["x"].dtype == self.inputs[0].dtype
        found = {"y": inputs["x"] * self.factor}
        return self.spoil(found) if callable(self.spoil) else found

    def close(self) -> None: ...


def judge(engine: Engine, own: Engine | None = None, dtype: str = "fp32") -> OutputParity:
    return compare(engine, Engine(), own, CASES, PRECISIONS[dtype])["y"]


def test_equal_engines_pass() -> None:
    found = judge(Engine())

    assert found
    assert (found.error, found.finite) == (0.0, True)
    assert found.cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("factor", "passes"), [(1 + 0.5 * PRECISIONS["fp32"].floor, True), (1 + 2 * PRECISIONS["fp32"].floor, False)]
)
def test_the_floor(factor: float, passes: bool) -> None:
    assert bool(judge(Engine(factor))) is passes


def test_four_times_the_error_of_torch_in_the_same_precision() -> None:
    own = Engine(1.01, torch.float16)

    assert judge(Engine(1.03, torch.float16), own, "fp16")
    assert not judge(Engine(1.05, torch.float16), own, "fp16")
    assert judge(Engine(1.05, torch.float16), own, "fp16").allowed == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_pytorch_overflows_the_floor_is_the_measure(value: float) -> None:
    own = Engine(spoil=lambda out: {"y": out["y"] * torch.tensor([1.0, value])})

    found = judge(Engine(1.003), own, "fp16")
    assert found
    assert found.allowed == 4 * PRECISIONS["fp16"].floor
    assert not judge(Engine(1.005), own, "fp16")


def test_bfloat16_has_three_bits_less() -> None:
    assert PRECISIONS["bf16"].floor == 2**3 * PRECISIONS["fp16"].floor
    assert judge(Engine(1.007), None, "bf16")
    assert not judge(Engine(1.009), None, "bf16")


def test_the_error_that_the_cosine_allows() -> None:
    target, noise = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    assert cosine(target + 0.99 * COSINE_ERROR * noise, target) > MIN_COSINE
    assert cosine(target + 1.01 * COSINE_ERROR * noise, target) < MIN_COSINE


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_fail(value: float) -> None:
    found = judge(Engine(spoil=lambda out: {"y": out["y"] * torch.tensor([1.0, value])}))

    assert not found
    assert not found.finite


def test_missing_outputs_fail() -> None:
    assert not judge(Engine(spoil=lambda _out: {}))
    assert not judge(Engine(spoil=lambda out: {"y": out["y"][:1]}))


def test_a_wrong_direction_fails_even_if_torch_errs_as_much() -> None:
    own = Engine(-1.0)

    found = judge(Engine(-1.0), own)
    assert found.error <= found.allowed
    assert not found


class Pair(Engine):
    """Two outputs; what each is multiplied with in each case."""

    def __init__(self, names: Sequence[str] = ("left", "right"), **factors: tuple[float, float]) -> None:
        super().__init__()
        self.outputs = tuple(TensorSpec(name, torch.float32, (2,)) for name in names)
        self.factors = factors

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        case = int(inputs["x"][0] > 2)
        return {s.name: inputs["x"] * self.factors.get(s.name, (1.0, 1.0))[case] for s in self.outputs}


@pytest.mark.parametrize("wrong", ["left", "right"])
@pytest.mark.parametrize("names", [("left", "right"), ("right", "left")])
def test_each_output_is_judged_by_itself(names: tuple[str, str], wrong: str) -> None:
    found = compare(Pair(names, **{wrong: (1.5, 1.5)}), Pair(names), None, CASES, PRECISIONS["fp32"])

    assert {name for name, parity in found.items() if not parity} == {wrong}
    assert {name: parity.error for name, parity in found.items()} == {
        name: pytest.approx(0.5 if name == wrong else 0.0) for name in names
    }


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left")])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_output_has_a_worst_case_of_its_own(names: tuple[str, str], reverse: bool) -> None:
    engine = Pair(names, left=(1.2, 1.1), right=(1.3, 1.4))

    found = compare(engine, Pair(names), None, CASES[::-1] if reverse else CASES, PRECISIONS["fp32"])

    assert {name: (parity.case, round(parity.error, 4)) for name, parity in found.items()} == {
        "left": ("first", 0.2),
        "right": ("second", 0.4),
    }


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left")])
def test_each_output_has_an_allowance_of_its_own(names: tuple[str, str]) -> None:
    own = Pair(names, left=(1.01, 1.01))
    engine = Pair(names, left=(1.03, 1.03), right=(1.03, 1.03))

    found = compare(engine, Pair(names), own, CASES, PRECISIONS["fp16"])

    assert found["left"]
    assert not found["right"]
    assert found["left"].allowed == pytest.approx(0.04, rel=0.01)
    assert found["right"].allowed == PRECISIONS["fp16"].floor


def test_outputs_of_another_order_or_with_more_among_them_are_matched_by_name() -> None:
    reference = Pair(left=(1.0, 1.0), right=(2.0, 2.0))
    engine = Pair(("more", "right", "left"), left=(1.0, 1.0), right=(2.0, 2.0))

    found = compare(engine, reference, None, CASES, PRECISIONS["fp32"])

    assert found.keys() == {"left", "right"}
    assert all(found.values())


def test_room_orders_outputs_from_worst_to_best() -> None:
    best_to_worst = [
        OutputParity(1.0, 0.0, 1e-3, "exact", True),
        OutputParity(0.9999, 2e-4, 1e-3, "a fifth of the allowance", True),
        OutputParity(0.9999, 2e-3, 4e-3, "a larger error, half of a larger allowance", True),
        OutputParity(0.9999, 1e-3, 1e-3, "all of the allowance", True),
        OutputParity(0.9999, 3e-3, 1e-3, "three times the allowance", True),
        OutputParity(0.99, 1e-4, 1e-3, "another direction", True),
        OutputParity(-1.0, math.inf, 1e-3, "not finite", False),
    ]

    rooms = [room(parity) for parity in best_to_worst]

    assert rooms == sorted(rooms, reverse=True)
    assert len(set(rooms)) == len(rooms)
    for parity in best_to_worst:
        assert bool(parity) is (room(parity) >= 1), parity.case


@pytest.mark.parametrize("reverse", [False, True])
def test_a_case_without_numbers_is_the_worst_of_all(reverse: bool) -> None:
    engine = Pair(left=(100.0, math.nan), right=(math.inf, 100.0))

    found = compare(engine, Pair(), None, CASES[::-1] if reverse else CASES, PRECISIONS["fp32"])

    assert {name: (parity.case, parity.finite) for name, parity in found.items()} == {
        "left": ("second", False),
        "right": ("first", False),
    }


@pytest.mark.parametrize("worst", ["first", "second"])
def test_the_worst_case_is_named(worst: str) -> None:
    def one_only(out: dict[str, Tensor]) -> dict[str, Tensor]:
        is_second = bool(out["y"][0] > 2)
        return {"y": out["y"] * (1.5 if is_second == (worst == "second") else 1.0)}

    found = judge(Engine(spoil=one_only))

    assert found.case == worst
    assert found.error == pytest.approx(0.5)


def test_relative_error() -> None:
    target = torch.tensor([3.0, 4.0])

    assert relative_error(target * 1.1, target) == pytest.approx(0.1, rel=1e-5)
    assert relative_error(torch.full((2,), math.nan), target) == math.inf
    assert relative_error(torch.full((2,), math.inf), target) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor(60000.0).half(), torch.tensor(60000.0)) < 1e-3, "squares overflow float16"


def test_cosine() -> None:
    x = torch.tensor([1.0, 0.0])

    assert cosine(x, 5 * x) == pytest.approx(1)
    assert cosine(x, x.flip(0)) == 0
    assert cosine(x, -x) == pytest.approx(-1)
    assert cosine(torch.zeros(2), torch.zeros(2)) == 1
    assert cosine(torch.zeros(2), x) == 0
    assert cosine(torch.full((2,), math.nan), x) == -1


def test_cases_of_the_unet() -> None:
    graph = unet_graph(tiny_unet(), TEXT_LENGTH, None, torch.float32)

    found = list(cases(graph, PROFILE, 4))

    assert len({case.name for case in found}) == len(found) == 3 * 2 * 3  # sizes, guidance, timesteps
    assert {float(case.inputs["timestep"]) for case in found} == {1.0, 500.0, 999.0}
    assert {tuple(case.inputs["sample"].shape) for case in found} == {
        (batch, 4, height // 2, width // 2)
        for pictures, height, width in [(1, 16, 16), (4, 32, 32), (1, 16, 32)]
        for batch in (pictures, 2 * pictures)
    }
    again = next(cases(graph, PROFILE, 4))
    assert all(torch.equal(value, again.inputs[name]) for name, value in found[0].inputs.items())


def test_cases_without_time_and_guidance(tiny_model) -> None:
    vae = ModelSource.find("canny", str(tiny_model)).vae(torch.float32)

    found = list(cases(vae_decoder_graph(vae, 2, torch.float32), PROFILE, 4))

    assert [case.name for case in found] == ["1x16x16", "4x32x32", "1x16x32"]


def test_nan_in_the_model_itself_fails() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * math.nan,)

    from engines.torch_eager import TorchEngine

    spec = TensorSpec("x", torch.float32, (2,))
    graph = Graph("g", Broken(), (spec,), (TensorSpec("y", torch.float32, (2,)),))
    reference = TorchEngine("g", graph.module, graph.inputs, graph.outputs)

    assert not compare(reference, reference, None, CASES, PRECISIONS["fp32"])["y"]
