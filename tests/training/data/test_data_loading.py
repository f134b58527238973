from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from icexport.errors import UsageError
from tests.training.data import making
from training.data.config import DataConfig
from training.data.loading import Batches, open_data
from training.data.shards import Shards
from training.data.stream import Cursor, Reader


def opened(source: Path | str, batch_size: int = 3, rank: int = 0, processes: int = 1, **options: Any) -> Batches:
    config = DataConfig(str(source), resolution=making.SIZE, **options)
    return open_data(config, making.tokenize, batch_size, rank=rank, processes=processes, seed=5)


def take(batches: Batches, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(batches, count))


def ids(batches: Batches, count: int) -> list[str]:
    return [name for batch in take(batches, count) for name in batch["ids"]]


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert [batch["ids"] for batch in left] == [batch["ids"] for batch in right]
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["pixels"], b["pixels"])
        assert torch.equal(a["input_ids"], b["input_ids"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One set as a folder and as shards, with broken pictures in it."""
    root = tmp_path_factory.mktemp("sources")
    making.folder(root / "folder", 13, broken=[2, 7], silent=[4])
    making.shards(root / "many", [4, 2, 5, 2], broken=[2, 7])
    making.shards(root / "one", [13], broken=[2, 7])
    return {"folder": str(root / "folder"), "shards": str(root / "many/*.tar"), "one shard": str(root / "one/*.tar")}


def test_a_batch(tmp_path: Path) -> None:
    making.folder(tmp_path / "set", 4, control=True)
    (batch,) = take(opened(tmp_path / "set", 4, shuffle=False, control_column="edges"), 1)
    assert batch["ids"] == ["000.png", "001.png", "002.png", "003.png"]
    assert batch["pixels"].shape == batch["control"].shape == (4, 3, making.SIZE, making.SIZE)
    assert batch["pixels"].dtype == batch["control"].dtype == torch.float32
    assert 0 <= batch["pixels"].min() < batch["pixels"].max() <= 1
    assert torch.allclose(batch["pixels"][:, 2, 0, 0] * 255, torch.tensor([0.0, 10, 20, 30]), atol=1)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], making.tokenize([f"caption {i}" for i in range(4)]))


def test_without_control_maps_the_task_makes_them(sources: dict[str, str]) -> None:
    assert set(take(opened(sources["folder"]), 1)[0]) == {"pixels", "input_ids", "ids"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards", "one shard"])
def test_a_resumed_loader_gives_the_batches_that_would_have_come(
    sources: dict[str, str], kind: str, workers: int, rank: int
) -> None:
    options: dict[str, Any] = {"rank": rank, "processes": 2, "workers": workers, "flip": True, "fit": "random-crop"}
    first = opened(sources[kind], shuffle_buffer=2, **options)
    running = iter(first)
    for count in (1, 4):  # with two workers an odd number of batches: the other worker is next
        list(itertools.islice(running, count))
        state = json.dumps(first.state_dict())
    expected = list(itertools.islice(running, 6))
    resumed = opened(sources[kind], shuffle_buffer=2, **options)
    resumed.load_state_dict(json.loads(state))
    assert_same(take(resumed, 6), expected)
    assert len({name for batch in expected for name in batch["ids"]}) > 3


def test_a_loader_that_is_iterated_again_goes_on(sources: dict[str, str]) -> None:
    for kind in ("folder", "shards"):
        expected = take(opened(sources[kind]), 6)
        batches = opened(sources[kind])
        assert_same(take(batches, 2) + take(batches, 4), expected)


def test_the_number_of_workers_does_not_matter_for_a_table(sources: dict[str, str]) -> None:
    batches = opened(sources["folder"], flip=True)
    start = take(batches, 2)
    resumed = opened(sources["folder"], flip=True, workers=2)
    resumed.load_state_dict(batches.state_dict())
    assert_same(start + take(resumed, 3), take(opened(sources["folder"], flip=True), 5))


def test_a_stream_needs_as_many_workers_as_before(sources: dict[str, str]) -> None:
    state = opened(sources["shards"]).state_dict()
    with pytest.raises(UsageError, match="1 stream readers, and the data set now has 2"):
        opened(sources["shards"], workers=2).load_state_dict(state)
    with pytest.raises(UsageError, match="now has none"):
        opened(sources["folder"]).load_state_dict(state)


def test_a_changed_data_set_is_noticed(sources: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    state = opened(sources["folder"]).state_dict()
    opened(sources["folder"]).load_state_dict(state)
    assert "changed" not in caplog.text
    opened(sources["folder"]).load_state_dict(state | {"length": 99})
    assert "it had 99 rows when the checkpoint was written and has 13 now" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_out_a_table_and_an_epoch_has_every_picture_once(tmp_path: Path, workers: int) -> None:
    making.folder(tmp_path / "set", 12)
    shares = [ids(opened(tmp_path / "set", rank=rank, processes=2, workers=workers), 4) for rank in (0, 1)]
    for epoch in (slice(0, 6), slice(6, 12)):
        assert sorted(shares[0][epoch] + shares[1][epoch]) == [f"{i:03d}.png" for i in range(12)]


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [12], [5, 4, 3]])
def test_processes_and_workers_share_out_shards(tmp_path: Path, sizes: list[int]) -> None:
    making.shards(tmp_path, sizes)
    config = DataConfig(f"{tmp_path}/*.tar", resolution=making.SIZE, shuffle_buffer=2)
    shards = Shards(config)
    for epoch in range(3):
        shares = [list(one_epoch(Reader(shards, config, 5, index, 4), epoch)) for index in range(4)]
        assert min(map(len, shares)) > 0
        assert sorted(name for share in shares for name in share) == sorted(sample.id for sample in shards)


def one_epoch(reader: Reader, epoch: int) -> Iterator[str]:
    for cursor, record in reader.records(Cursor(epoch)):
        if cursor.epoch != epoch:
            return
        yield record.id


def test_every_epoch_has_its_own_order_and_another_seed_another(sources: dict[str, str], tmp_path: Path) -> None:
    making.folder(tmp_path / "set", 12)
    making.shards(tmp_path / "shards", [6, 6])
    for source in (tmp_path / "set", tmp_path / "shards/*.tar"):
        names = ids(opened(source), 8)
        assert sorted(names[:12]) == sorted(names[12:])
        assert names[:12] != names[12:]
        config = DataConfig(str(source), resolution=making.SIZE)
        other = open_data(config, making.tokenize, 3, seed=6)
        assert ids(other, 4) != names[:12]
        assert ids(opened(source, shuffle=False), 8) == 2 * sorted(names[:12])


def test_random_choices_differ_between_epochs_and_repeat_with_the_seed(tmp_path: Path) -> None:
    making.folder(tmp_path / "set", 1)
    making.shards(tmp_path / "shards", [1])
    for source in (tmp_path / "set", tmp_path / "shards/*.tar"):
        pixels = [b["pixels"].numpy().tobytes() for b in take(opened(source, 1, flip=True, fit="random-crop"), 12)]
        again = [b["pixels"].numpy().tobytes() for b in take(opened(source, 1, flip=True, fit="random-crop"), 12)]
        assert pixels == again
        assert len(set(pixels)) == 12


def test_loading_leaves_the_global_generators_alone(sources: dict[str, str]) -> None:
    for workers in (0, 2):
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 -- it is the global generator that is looked at
        take(opened(sources["folder"], flip=True, workers=workers), 2)
        after = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        assert after == (torch.rand(1).item(), np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize(("count", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_less_data_than_a_batch_wraps_around(tmp_path: Path, count: int, workers: int) -> None:
    making.folder(tmp_path / "set", count)
    making.shards(tmp_path / "shards", [count])
    for source in (tmp_path / "set", tmp_path / "shards/*.tar"):
        for rank in (0, 1):
            for batch in take(opened(source, 5, rank, 2, workers=workers), 3):
                assert batch["pixels"].shape == (5, 3, making.SIZE, making.SIZE)


def test_saved_data_sets_with_pictures_inside(tmp_path: Path) -> None:
    rows = {
        "photo": [{"bytes": making.png(making.picture(i)), "path": None} for i in range(3)],
        "words": ["a", "b", "c"],
    }
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    saved = datasets.Dataset.from_dict(rows, features=features)
    columns = {"image_column": "photo", "caption_column": "words", "shuffle": False}
    saved.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "splits")
    for name, split in (("plain", "train"), ("splits", "test")):
        (batch,) = take(opened(tmp_path / name, split=split, **columns), 1)
        assert batch["ids"] == ["row 0", "row 1", "row 2"]
        assert torch.equal(batch["input_ids"], making.tokenize(["a", "b", "c"]))
    with pytest.raises(UsageError, match="has no split 'train'; it has: test"):
        opened(tmp_path / "splits", **columns)


def test_any_other_folder_that_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    making.picture(4).save(tmp_path / "pictures" / "a.picture", "png")
    rows = datasets.Dataset.from_dict({"file": ["pictures/a.picture"], "captions": [["one", "two"]]})
    rows.to_parquet(tmp_path / "data.parquet")
    (batch,) = take(opened(tmp_path, 1, image_column="file", caption_column="captions"), 1)
    assert round(batch["pixels"][0, 2].mean().item() * 255) == 40


def test_arguments_are_checked(sources: dict[str, str]) -> None:
    for batch_size, rank in ((0, 0), (1, 1)):
        with pytest.raises(UsageError, match="cannot be made"):
            opened(sources["folder"], batch_size, rank)
