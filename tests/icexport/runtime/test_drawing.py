"""How the pictures of a request are split into calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from icexport.errors import UsageError
from icexport.graphs.profile import SizeRange
from icexport.runtime.drawing import Request, draw, split_calls


class Pipe:
    """Draws pictures that are the mean of their control map plus their generator's first number; notes its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: Any, **options: Any) -> Any:
        self.calls.append({"prompt": prompt, **options})
        count, maps = len(options["generator"]), options["image"]
        numbers = torch.stack([torch.rand(1, 1, 1, generator=generator) for generator in options["generator"]])
        return SimpleNamespace(images=maps.mean((1, 2, 3), keepdim=True).expand(count, 1, 1, 1) + numbers)


def first_number(seed: int) -> float:
    return float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    ("count", "largest", "expected"),
    [(1, 4, [[0]]), (4, 4, [[0, 1, 2, 3]]), (5, 4, [[0, 1, 2], [3, 4]]), (3, 1, [[0], [1], [2]])],
)
def test_calls_are_even(count: int, largest: int, expected: list[list[int]]) -> None:
    assert list(split_calls(count, SizeRange(1, 1, largest))) == expected


def test_each_picture_has_its_own_map_prompt_and_seed() -> None:
    pipe, maps = Pipe(), torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)

    drawn = draw(pipe, maps, Request(["a", "b", "c"], [7, 8, 9]), calls=SizeRange(1, 1, 2))

    assert [call["prompt"] for call in pipe.calls] == [["a", "b"], ["c"]]
    assert [call["negative_prompt"] for call in pipe.calls] == [["", ""], [""]]
    assert drawn.pictures.flatten().tolist() == pytest.approx([i + first_number(7 + i) for i in range(3)])


def test_a_call_that_is_too_small_is_filled_up_and_what_is_too_much_thrown_away() -> None:
    pipe, maps = Pipe(), torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)

    drawn = draw(pipe, maps, Request("a", [7, 8, 9]), calls=SizeRange(2, 2, 2))

    assert [len(call["generator"]) for call in pipe.calls] == [2, 2]
    assert torch.equal(pipe.calls[1]["image"], maps[[2, 2]])
    assert drawn.pictures.flatten().tolist() == pytest.approx([i + first_number(7 + i) for i in range(3)])


def test_one_map_and_one_prompt_are_given_once() -> None:
    pipe = Pipe()

    draw(pipe, torch.zeros(1, 3, 2, 2), Request("a", [1, 2, 3]), calls=SizeRange(1, 1, 4))

    (call,) = pipe.calls
    assert (call["prompt"], call["negative_prompt"], call["num_images_per_prompt"]) == ("a", "", 3)
    assert len(call["image"]) == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="3 seeds, but 2 control maps and 3 prompts"):
        draw(Pipe(), torch.zeros(2, 3, 2, 2), Request("a", [1, 2, 3]), calls=SizeRange(1, 1, 4))
