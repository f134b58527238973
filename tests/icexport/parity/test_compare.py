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
from icexport.models.precision import PRECISIONS
from icexport.models.source import ModelSource
from icexport.parity.cases import Case, cases
from icexport.parity.compare import (
    COSINE_ERROR,
    MIN_COSINE,
    OutputParity,
    compare,
    cosine,
    expect,
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
    return against(Engine(), engine, own, dtype)["y"]


def against(
    reference: Engine, engine: Engine, own: Engine | None = None, dtype: str = "fp32", cases: list[Case] = CASES
) -> dict[str, OutputParity]:
    return compare(engine, expect(cases, reference, own, PRECISIONS[dtype]))


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
    found = against(Pair(names), Pair(names, **{wrong: (1.5, 1.5)}))

    assert {name for name, parity in found.items() if not parity} == {wrong}
    assert {name: parity.error for name, parity in found.items()} == {
        name: pytest.approx(0.5 if name == wrong else 0.0) for name in names
    }


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left")])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_output_has_a_worst_case_of_its_own(names: tuple[str, str], reverse: bool) -> None:
    engine = Pair(names, left=(1.2, 1.1), right=(1.3, 1.4))

    found = against(Pair(names), engine, cases=CASES[::-1] if reverse else CASES)

    assert {name: (parity.case, round(parity.error, 4)) for name, parity in found.items()} == {
        "left": ("first", 0.2),
        "right": ("second", 0.4),
    }


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left")])
def test_each_output_has_an_allowance_of_its_own(names: tuple[str, str]) -> None:
    own = Pair(names, left=(1.01, 1.01))
    engine = Pair(names, left=(1.03, 1.03), right=(1.03, 1.03))

    found = against(Pair(names), engine, own, "fp16")

    assert found["left"]
    assert not found["right"]
    assert found["left"].allowed == pytest.approx(0.04, rel=0.01)
    assert found["right"].allowed == PRECISIONS["fp16"].floor


def test_outputs_of_another_order_or_with_more_among_them_are_matched_by_name() -> None:
    reference = Pair(left=(1.0, 1.0), right=(2.0, 2.0))
    engine = Pair(("more", "right", "left"), left=(1.0, 1.0), right=(2.0, 2.0))

    found = against(reference, engine)

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

    found = against(Pair(), engine, cases=CASES[::-1] if reverse else CASES)

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

    assert [(case.name, len(case.rows) or len(case.inputs["sample"])) for case in found] == [
        ("1x16x16 guided t=500", 2),
        ("1x16x16 t=1", 1),
        ("1x16x16 t=999", 1),
        ("1x16x32 guided t=500", 2),
        ("4x32x32 guided t=500", 8),
    ]
    assert [case.inputs["timestep"].tolist() for case in found] == [[500, 750], [1], [999], [500, 750], [500, 750]]
    assert [tuple(case.inputs["sample"].shape) for case in found] == [
        (2, 4, 8, 8),
        (1, 4, 8, 8),
        (1, 4, 8, 8),
        (2, 4, 8, 16),
        (2, 4, 16, 16),
    ]
    again = next(cases(graph, PROFILE, 4))
    assert all(torch.equal(value, again.inputs[name]) for name, value in found[0].inputs.items())


def test_a_large_batch_of_the_smallest_size_costs_the_reference_nothing() -> None:
    graph = unet_graph(tiny_unet(), TEXT_LENGTH, None, torch.float32)
    size = SizeRange(16, 16, 16)

    first, *_, last = cases(graph, Profile(SizeRange(1, 1, 4), size, size), 4)

    assert last.inputs is first.inputs
    assert last.rows == (0, 1, 1, 0, 1, 0, 0, 1)
    seen = []
    reference = graph.engine()
    module = reference._module
    reference._module = lambda *tensors: seen.append(tensors) or module(*tensors)
    one, many = expect([first, last], reference, None, PRECISIONS["fp32"])
    assert len(seen) == 1
    assert many.outputs is one.outputs
    # What the reference would have computed, had it got all rows.
    whole = graph.engine()(last.spread(last.inputs, many.counted))
    assert all(relative_error(whole[n], value) < 1e-5 for n, value in last.spread(many.outputs, many.counted).items())


def test_a_fixed_batch_has_two_different_samples() -> None:
    graph = unet_graph(tiny_unet(), TEXT_LENGTH, None, torch.float32)
    size = SizeRange(16, 16, 16)

    found = list(cases(graph, Profile(SizeRange(3, 3, 3), size, size), 4))

    assert [(case.name, len(case.rows), len(case.inputs["sample"])) for case in found] == [
        ("3x16x16 guided t=500", 6, 2),
        ("3x16x16 t=1", 3, 2),
        ("3x16x16 t=999", 3, 2),
    ]


class Rows(Engine):
    """As many rows as it gets; ``spoil`` changes what comes out."""

    def __init__(self, spoil: object = None) -> None:
        super().__init__(2.0, spoil=spoil)
        self.inputs = (TensorSpec("x", torch.float32, ("samples", 2)),)
        self.outputs = (TensorSpec("y", torch.float32, ("samples", 2)),)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: {"y": out["y"][:1].expand(len(out["y"]), -1)},
        lambda out: {"y": out["y"].roll(1, 0)},
        lambda out: {"y": out["y"].flip(0).roll(1, 0)},
        lambda out: {"y": torch.cat([out["y"][:2], out["y"][:2].repeat(3, 1)])},
        lambda out: {"y": out["y"].mean(0, keepdim=True).expand(len(out["y"]), -1)},
        lambda out: {"y": torch.cat([out["y"][:-1], torch.zeros(1, 2)])},
    ],
    ids=["the first everywhere", "shifted", "reversed", "every other one", "mixed", "the last missing"],
)
def test_rows_in_a_wrong_place_fail(spoil: object) -> None:
    case = Case("many", {"x": torch.tensor([[1.0, 2.0], [-3.0, 1.0]])}, (0, 1, 1, 0, 1, 0, 0, 1))

    assert against(Rows(), Rows(), cases=[case])["y"]
    assert not against(Rows(), Rows(spoil), cases=[case])["y"]


def test_samples_one_by_one() -> None:
    case = Case("two", {"x": torch.tensor([[1.0, 2.0], [-3.0, 1.0]])}, (0, 1, 1))
    (both,) = expect([case], Rows(), None, PRECISIONS["fp32"])

    found = list(both.samples())

    assert [one.case.name for one in found] == ["two sample 0", "two sample 1"]
    assert [one.case.inputs["x"].tolist() for one in found] == [[[1.0, 2.0]], [[-3.0, 1.0]]]
    assert [one.outputs["y"].tolist() for one in found] == [[[2.0, 4.0]], [[-6.0, 2.0]]]
    assert {one.case.rows for one in found} == {()}
    (alone,) = expect([Case("one", {"x": torch.tensor([[1.0, 2.0]])})], Rows(), None, PRECISIONS["fp32"])
    assert [one.case.name for one in alone.samples()] == ["one"]


def test_cases_without_time_and_guidance(tiny_model) -> None:
    vae = ModelSource.find("canny", str(tiny_model)).vae(torch.float32)

    found = list(cases(vae_decoder_graph(vae, 2, torch.float32), PROFILE, 4))

    assert [case.name for case in found] == ["1x16x16", "1x16x32", "4x32x32"]
    assert found[-1].rows == (0, 1, 1, 0)


def test_nan_in_the_model_itself_fails() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * math.nan,)

    from engines.torch_eager import TorchEngine

    spec = TensorSpec("x", torch.float32, (2,))
    graph = Graph("g", Broken(), (spec,), (TensorSpec("y", torch.float32, (2,)),))
    reference = TorchEngine("g", graph.module, graph.inputs, graph.outputs)

    assert not against(reference, reference)["y"]
