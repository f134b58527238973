"""Which shapes TensorRT is asked for."""

from __future__ import annotations

import pytest

from icexport.backends.plans import optimisation_profiles
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.shapes import TensorInfo

SAMPLE = TensorInfo("sample", "float16", ("samples", 4, "8*rows", "8*columns"))
LATENTS = TensorInfo("latents", "float16", ("pictures", 4, "8*rows", "8*columns"))
TIME = TensorInfo("timestep", "float32", ())
TEXT = TensorInfo("input_ids", "int64", ("prompts", 77))


def profile(batch: str, height: str = "512", width: str = "512") -> Profile:
    return Profile(*map(SizeRange.parse, (batch, height, width)))


def shapes(*inputs: TensorInfo, of: Profile) -> list[dict[str, object]]:
    return list(optimisation_profiles(inputs, of, 64))


def static(*shape: int) -> tuple[tuple[int, ...], ...]:
    return (shape, shape, shape)


def test_a_fixed_size_is_static_with_and_without_guidance() -> None:
    assert shapes(SAMPLE, TIME, of=profile("1")) == [
        {"sample": static(1, 4, 64, 64)},
        {"sample": static(2, 4, 64, 64)},
    ]
    assert shapes(LATENTS, of=profile("3")) == []


def test_ranges_are_one_profile() -> None:
    found = shapes(SAMPLE, TIME, of=profile("1:2:4", "512:512:768", "512"))
    assert found == [{"sample": ((1, 4, 64, 64), (4, 4, 64, 64), (8, 4, 96, 64))}]
    assert shapes(LATENTS, of=profile("1:2:4")) == [{"latents": ((1, 4, 64, 64), (2, 4, 64, 64), (4, 4, 64, 64))}]


def test_every_listed_size_is_static() -> None:
    listed = Profile.of_shapes(SizeRange.parse(1), ["512x512", "512x768", "512x512"])
    assert shapes(LATENTS, of=listed) == [
        {"latents": static(1, 4, 64, 64)},
        {"latents": static(1, 4, 64, 96)},
    ]
    assert len(shapes(SAMPLE, of=listed)) == 4


def test_the_text_encoder_knows_prompts_only() -> None:
    assert shapes(TEXT, of=profile("1")) == []
    assert shapes(TEXT, of=profile("1:2:4", "512:512:768")) == [{"input_ids": ((1, 77), (2, 77), (4, 77))}]


@pytest.mark.parametrize("names", [["512x512"], ["512x512", "768x512"]])
def test_listed_sizes_survive_the_manifest(names: list[str]) -> None:
    listed = Profile.of_shapes(SizeRange.parse(1), names)
    assert Profile.from_json(listed.to_json()) == listed
    assert bool(listed.shapes) == (len(names) > 1)  # one size is what the ranges say already
