from __future__ import annotations

import pytest

from icexport.errors import UsageError
from training.data.config import DataConfig


def test_lists_of_a_recipe_become_tuples() -> None:
    config = DataConfig(["a.tar", "b.tar"], resolution=[64, 128])  # type: ignore[arg-type]
    assert (config.source, config.resolution, config.size) == (("a.tar", "b.tar"), (64, 128), (64, 128))
    assert DataConfig("x").size == (512, 512)


@pytest.mark.parametrize(("source", "is_shards"), [("a/*.tar", True), ("a/{0..9}.TGZ", True), ("folder", False)])
def test_what_counts_as_shards(source: str, is_shards: bool) -> None:
    assert DataConfig(source).is_shards is is_shards


@pytest.mark.parametrize("resolution", [0, 100, -8, (64, 100), (64,), (64, 64, 64)])
def test_a_resolution_must_be_a_multiple_of_8(resolution: int | tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="multiple of 8"):
        DataConfig("x", resolution=resolution)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(UsageError) as error:
        DataConfig("", resolution=7, fit="pad", workers=-1, shuffle_buffer=0, control_column="text")  # type: ignore[arg-type]
    for name in ("source", "resolution", "fit", "workers", "shuffle_buffer", "control_column"):
        assert name in str(error.value)


def test_shards_have_no_splits() -> None:
    with pytest.raises(UsageError, match="no splits"):
        DataConfig("a/*.tar", split="validation")
