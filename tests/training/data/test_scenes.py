from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.data import scenes
from training.data.drawn import DrawnBatches


def test_a_scene_is_a_function_of_its_index() -> None:
    first, again, other = scenes.render(3), scenes.render(3), scenes.render(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.depth, again.depth)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(scenes.render(scenes.HELD_OUT).image, scenes.render(0).image)


@pytest.mark.parametrize("index", range(6))
def test_depth_is_exact(index: int) -> None:
    depth = scenes.render(index).depth
    assert depth.min() == 0
    assert depth.max() == 1
    assert (depth[0] == 0).any(), "the wall is farthest"
    floor = depth[-1]
    # An object stands on the floor and is cut off by the lower border at most: the last row is floor or nearer things.
    assert floor.min() >= 0.8
    columns = np.diff(depth, axis=0)
    free = (columns >= -1e-6).all(axis=0)
    assert free.any(), "where no object stands, depth only rises towards the lower border"


def test_color_says_nothing_about_depth() -> None:
    found = scenes.render_many(range(120))
    nearness, redness = [], []
    for image, depth in zip(found.images.astype(float), found.depth, strict=True):
        row = 40  # of floor and objects
        nearness.append(depth[row].mean())
        redness.append((image[row, :, 0] - image[row].mean(-1)).mean())
    assert abs(np.corrcoef(nearness, redness)[0, 1]) < 0.25


def test_captions_name_the_nearest_objects_first() -> None:
    captions = [scenes.render(i).caption for i in range(40)]
    assert all(" room with a" in caption for caption in captions)
    assert all(any(shape in caption for shape in scenes.SHAPES) for caption in captions)
    assert not any(" a orange" in caption for caption in captions)


def test_prepared_scenes_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scenes.prepare(tmp_path, 3, workers=1)
    monkeypatch.setattr(scenes, "render", lambda _index: pytest.fail("rendered twice"))
    again = scenes.prepare(tmp_path, 3, workers=1)
    assert np.array_equal(made.images, again.images)
    assert np.array_equal(made.depth, again.depth)
    assert made.captions == again.captions
    assert [path.name for path in tmp_path.iterdir()] == ["scenes-3.npz"]


def test_drawn_batches_go_on_where_they_were() -> None:
    def draw(generator: object) -> dict[str, object]:
        import torch

        assert isinstance(generator, torch.Generator)
        return {"value": float(torch.rand((), generator=generator))}

    def values(batches: DrawnBatches, count: int) -> list[object]:
        stream = iter(batches)
        return [next(stream)["value"] for _ in range(count)]

    whole = values(DrawnBatches(draw, seed=1), 6)
    first = DrawnBatches(draw, seed=1)
    assert values(first, 2) == whole[:2]
    second = DrawnBatches(draw, seed=1)
    second.load_state_dict(first.state_dict())
    assert values(second, 4) == whole[2:]
    assert len({*whole, *values(DrawnBatches(draw, seed=1, rank=1), 6), *values(DrawnBatches(draw, seed=2), 6)}) == 18
