from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from icexport.errors import UsageError
from tests.training.data import making
from training.data.config import DataConfig
from training.data.loading import open_data
from training.data.records import records
from training.data.samples import Fault
from training.data.shards import Shards, expand_braces


def config(source: Any, **options: Any) -> DataConfig:
    return DataConfig(source, resolution=making.SIZE, **options)


def captions(source: Any, **options: Any) -> list[str]:
    return [record.caption for record in records(config(source, **options))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{plain}", ["{plain}"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


def test_patterns_braces_and_lists_name_the_same_shards(tmp_path: Path) -> None:
    making.shards(tmp_path, [1, 2, 1])
    expected = [f"caption {i}" for i in range(4)]
    assert captions(f"{tmp_path}/*.tar") == expected
    assert captions(f"{tmp_path}/{{0..2}}.tar") == expected
    assert captions([f"{tmp_path}/0.tar", f"{tmp_path}/?.tar"]) == expected
    assert captions([f"{tmp_path}/2.tar", f"{tmp_path}/0.tar", f"{tmp_path}/2.tar"]) == [expected[3], expected[0]]


def test_other_places_are_opened_by_fsspec(tmp_path: Path) -> None:
    import fsspec

    file = making.shard(tmp_path / "0.tar", {"a": making.sample(0)})
    with fsspec.open("memory://bucket/0.tar", "wb") as remote:
        remote.write(file.read_bytes())
    for pattern in ("memory://bucket/0.tar", "memory://bucket/*.tar"):
        assert captions(pattern) == ["caption 0"]
    with pytest.raises(UsageError, match="cannot be opened"):
        Shards(config("nonsense://bucket/0.tar"))


def test_compressed_shards(tmp_path: Path) -> None:
    making.shard(tmp_path / "0.tar.gz", {"a": making.sample(0), "b": making.sample(1)}, "gz")
    assert captions(f"{tmp_path}/0.tar.gz") == ["caption 0", "caption 1"]


def test_a_sample_is_what_shares_its_name_up_to_the_first_dot(tmp_path: Path) -> None:
    making.shard(
        tmp_path / "0.tar",
        {
            "x/1.5": {"png": b"not taken for 1.png"},
            "x/a": {"JPG": making.png(making.picture(1)), "txt": b"in txt", "json": b'{"text": "in json"}'},
            "y/a": {"webp": making.png(making.picture(2)), "json": b'{"text": "in json"}'},
            "._z": {"png": b"what macOS leaves behind"},
            "b": {"png": making.png(making.picture(3)), "json": b"[not json"},
            "c": {"txt": b"\xff", "image.png": making.png(making.picture(4))},
        },
    )
    found = records(config(f"{tmp_path}/0.tar"))
    assert [(r.id, r.caption) for r in found] == [
        ("0.tar/x/a", "in txt"),
        ("0.tar/y/a", "in json"),
        ("0.tar/b", ""),
        ("0.tar/c", "�"),
    ]
    assert found.counts.summary() == {"broken_pictures": 1, "without_caption": 1}


def test_control_maps_lie_beside_their_pictures(tmp_path: Path) -> None:
    with_map = making.sample(1) | {"control.png": making.png(making.picture(9))}
    making.shard(tmp_path / "0.tar", {"a": with_map, "b": making.sample(2)})
    found = records(config(f"{tmp_path}/0.tar", control_column="control"))
    (record,) = found
    assert record.control is not None
    assert record.control.getpixel((0, 0))[2] == 90  # type: ignore[index]
    assert found.counts.broken == {"0.tar/b": "control map: there is no picture"}
    assert all(r.control is None for r in records(config(f"{tmp_path}/0.tar")))


def test_a_cut_shard_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    making.shards(tmp_path, [3, 2])
    cut = tmp_path / "0.tar"
    cut.write_bytes(cut.read_bytes()[: 512 + 512 + 512 + 512 + 512 + 20])  # a.png, a.txt, and the start of b.png
    (tmp_path / "2.tar").write_bytes(b"not an archive at all" * 50)
    found = records(config(f"{tmp_path}/*.tar"))
    assert [r.caption for r in found] == ["caption 0", "caption 3", "caption 4"]
    assert [name.rsplit("/", 1)[-1] for name in found.counts.broken] == ["0.tar", "2.tar"]
    batches = open_data(config(f"{tmp_path}/*.tar"), making.tokenize, 2)
    assert len({name for b in itertools.islice(batches, 6) for name in b["ids"]}) == 3
    assert batches.counts.summary()["broken_pictures"] == 2


def test_a_cut_archive_ends_in_a_fault(tmp_path: Path) -> None:
    making.shards(tmp_path, [1])
    shards = Shards(config(f"{tmp_path}/0.tar"))
    (tmp_path / "0.tar").unlink()
    (fault,) = shards
    assert isinstance(fault, Fault)
    assert "cannot be read any further" in fault.reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cls": b"3"},
            "No caption and no picture in the first 2 samples of .*key.jpg.*The first sample has: key.cls",
        ),
        ({"png": b"x"}, "No caption in .*caption_column="),
        (
            {"png": b"x", "json": json.dumps({"prompt": "t"}).encode()},
            "'text' in key.json.*has: .*'prompt' in key.json",
        ),
        ({"png": b"x", "txt": b"t"}, "No control map in .*expected key.edges.png; name another with control_column="),
    ],
)
def test_what_no_sample_has_is_an_error(tmp_path: Path, fields: dict[str, bytes], message: str) -> None:
    making.shard(tmp_path / "0.tar", {"a": fields, "b": fields})
    control = "edges" if "txt" in fields else None
    with pytest.raises(UsageError, match=message):
        Shards(config(f"{tmp_path}/0.tar", control_column=control))


def test_shards_that_are_not_there_or_empty(tmp_path: Path) -> None:
    for pattern in ("*.tar", "0.tar", "{0..2}.tar"):
        with pytest.raises(UsageError, match="no shards"):
            Shards(config(f"{tmp_path}/{pattern}"))
    making.shard(tmp_path / "0.tar", {})
    with pytest.raises(UsageError, match="no samples"):
        Shards(config(f"{tmp_path}/0.tar"))
    (tmp_path / "1.tar").write_bytes(b"junk" * 300)
    with pytest.raises(UsageError, match="no samples.*cannot be read"):
        Shards(config(f"{tmp_path}/1.tar"))
