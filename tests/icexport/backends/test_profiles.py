"""Which shapes TensorRT is asked for."""

from __future__ import annotations

import pytest
import torch

from engines.base import TensorSpec
from icexport.backends.plans import optimisation_profiles
from icexport.graphs.profile import Profile, SizeRange

SAMPLE = TensorSpec("sample", torch.float16, ("batch", 4, "8*h", "8*w"))
TIME = TensorSpec("timestep", torch.float32, ())
TEXT = TensorSpec("input_ids", torch.int64, ("prompts", 77))


def profile(batch: str, height: str = "512", width: str = "512") -> Profile:
    return Profile(*map(SizeRange.parse, (batch, height, width)))


def shapes(graph: str, *specs: TensorSpec, of: Profile) -> list[dict[str, object]]:
    return list(optimisation_profiles(graph, specs, of, 64))


def static(*shape: int) -> tuple[tuple[int, ...], ...]:
    return (shape, shape, shape)


def test_a_fixed_size_is_static_with_and_without_guidance() -> None:
    assert shapes("unet", SAMPLE, TIME, of=profile("1")) == [
        {"sample": static(1, 4, 64, 64)},
        {"sample": static(2, 4, 64, 64)},
    ]
    assert shapes("probe", SAMPLE, of=profile("3")) == [{"sample": static(3, 4, 64, 64)}]


def test_ranges_are_one_profile() -> None:
    found = shapes("unet", SAMPLE, TIME, of=profile("1:2:4", "512:512:768", "512"))
    assert found == [{"sample": ((1, 4, 64, 64), (4, 4, 64, 64), (8, 4, 96, 64))}]
    assert shapes("vae_decoder", SAMPLE, of=profile("1:2:4")) == [
        {"sample": ((1, 4, 64, 64), (2, 4, 64, 64), (4, 4, 64, 64))}
    ]


def test_every_listed_size_is_static() -> None:
    listed = Profile.of_shapes(SizeRange.parse(1), ["512x512", "512x768", "512x512"])
    assert shapes("probe", SAMPLE, of=listed) == [
        {"sample": static(1, 4, 64, 64)},
        {"sample": static(1, 4, 64, 96)},
    ]
    assert len(shapes("controlnet", SAMPLE, of=listed)) == 4


def test_the_text_encoder_knows_prompts_only() -> None:
    assert shapes("text_encoder", TEXT, of=profile("1")) == []
    assert shapes("text_encoder", TEXT, of=profile("1:2:4", "512:512:768")) == [
        {"input_ids": ((1, 77), (2, 77), (4, 77))}
    ]


@pytest.mark.parametrize("names", [["512x512"], ["512x512", "768x512"]])
def test_listed_sizes_survive_the_manifest(names: list[str]) -> None:
    listed = Profile.of_shapes(SizeRange.parse(1), names)
    assert Profile.from_json(listed.to_json()) == listed
    assert bool(listed.shapes) == (len(names) > 1)  # one size is what the ranges say already
