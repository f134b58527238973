from __future__ import annotations

import itertools
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icexport.errors import UsageError
from tests.training.data import making
from training.data import loading, stream
from training.data.config import DataConfig
from training.data.loading import Batches, open_data
from training.data.records import records
from training.data.samples import BROKEN, NO_CAPTION, Counts, Fault


def opened(source: Path | str, batch_size: int = 3, **options: Any) -> Batches:
    return open_data(DataConfig(str(source), resolution=making.SIZE, **options), making.tokenize, batch_size)


def ids(batches: Batches, count: int) -> list[str]:
    return [name for batch in itertools.islice(batches, count) for name in batch["ids"]]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Eight pictures, of which 3 and 6 are good; 3 has no caption."""
    folder = making.folder(tmp_path / "set", 8, broken=[0], silent=[3])
    (folder / "001.png").write_bytes(b"")
    (folder / "002.png").write_text("not a picture")
    (folder / "004.png").unlink()
    Image.fromarray(np.full((9, 9), 60_000, np.int32)).save(folder / "005.png", format="TIFF")
    (folder / "007.png").write_bytes(making.png(making.picture(7, 400, 400))[:300])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_replaced_counted_and_warned_about_once(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    batches = opened(damaged, workers=workers)
    assert set(ids(batches, 12)) == {"003.png", "006.png"}
    assert set(batches.counts.broken) == {f"00{i}.png" for i in (0, 1, 2, 4, 5, 7)}
    assert batches.counts.summary() == {"broken_pictures": 6, "without_caption": 1}
    assert "integers of 32 bits" in batches.counts.broken["005.png"]
    assert "No such file" in batches.counts.broken["004.png"]
    assert caplog.text.count("Broken picture: ") == 6
    assert caplog.text.count("No caption: 003.png") == 1


def test_a_missing_caption_is_the_empty_prompt(damaged: Path) -> None:
    for batch in itertools.islice(opened(damaged), 4):
        for name, tokens in zip(batch["ids"], batch["input_ids"], strict=True):
            assert tokens.equal(making.tokenize(["" if name == "003.png" else "caption 6"])[0])


def test_only_the_first_faults_are_logged_in_full(caplog: pytest.LogCaptureFixture) -> None:
    counts = Counts()
    for i in range(100):
        counts.add(Fault(BROKEN, f"p{i}", "cut"))
        counts.add(Fault(BROKEN, f"p{i}", "cut"))
    counts.add(Fault(NO_CAPTION, "p0", "empty"))
    assert counts.summary() == {"broken_pictures": 100, "without_caption": 1}
    messages = [record.getMessage() for record in caplog.records]
    assert messages[:10] == [f"Broken picture: p{i}: cut" for i in range(10)]
    assert [m.split(",")[0] for m in messages[10:-1]] == [f"Broken picture: {n} so far" for n in (20, 40, 80)]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_nothing_readable_is_an_error(tmp_path: Path, kind: str, workers: int) -> None:
    making.folder(tmp_path / "folder", 3, broken=range(3))
    making.shards(tmp_path / "shards", [2, 1], broken=range(3))
    batches = opened(tmp_path / (kind if kind == "folder" else "shards/*.tar"), workers=workers)
    with pytest.raises(UsageError, match="can be read") as error:
        next(iter(batches))
    assert "Traceback" not in str(error.value)
    with pytest.raises(UsageError, match="None of the 3 pictures .* can be read"):
        list(records(batches._config))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_huge_set_of_broken_pictures_is_given_up(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "HOPELESS", 5)
    monkeypatch.setattr(stream, "HOPELESS", 5)
    making.folder(tmp_path / "folder", 9, broken=range(9))
    making.shards(tmp_path / "shards", [9], broken=range(9))
    with pytest.raises(UsageError, match="None of 5 "):
        next(iter(opened(tmp_path / (kind if kind == "folder" else "shards/*.tar"))))


def test_a_single_readable_picture_is_found_from_everywhere(tmp_path: Path) -> None:
    making.folder(tmp_path / "set", 20, broken=set(range(20)) - {17})
    assert set(ids(opened(tmp_path / "set", 8), 5)) == {"017.png"}


def message(source: Path | str, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        opened(source, **options)
    return str(error.value)


def test_unknown_places_and_columns(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 2)
    assert "no column 'prompt'; it has: image, text" in message(folder, caption_column="prompt")
    assert "caption_column=" in message(folder, caption_column="prompt")
    assert "no column 'edges'" in message(folder, control_column="edges")
    assert "control_column=" in message(folder, control_column="edges")
    assert "image_column=" in message(folder, image_column="photo")
    assert "no split 'validation'; it has: train" in message(folder, split="validation")
    assert "does not exist" in message(tmp_path / "nowhere")
    assert "'nobody/nothing'" in message("nobody/nothing")
    assert "is a file" in message(folder / "metadata.jsonl")


def test_columns_of_the_wrong_kind(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 1)
    row = {"file_name": "000.png", "text": "t", "label": 3}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert "expected text" in message(folder, caption_column="label")
    assert "expected pictures or names" in message(folder, control_column="label")


def test_a_folder_without_captions_names_the_fix(tmp_path: Path) -> None:
    making.picture(0).save(tmp_path / "a.png")
    text = message(tmp_path)
    assert "has no column 'text'; it has: image" in text
    assert "metadata.jsonl" in text


def test_empty_sets(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "cannot be opened" in message(tmp_path / "empty")
    (making.folder(tmp_path / "blank", 1) / "metadata.jsonl").write_text("")
    assert "cannot be opened" in message(tmp_path / "blank")


def test_metadata_that_is_not_json_is_named(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a"}\n{"file_name":\n')
    assert "JSON" in message(folder)


def test_the_folders_of_a_picture_folder_are_its_splits(tmp_path: Path) -> None:
    making.folder(tmp_path / "train", 1)
    making.folder(tmp_path / "val", 2)
    assert [record.id for record in records(DataConfig(str(tmp_path), split="val"))] == ["val/000.png", "val/001.png"]
    assert "no split 'test'; it has: train, val" in message(tmp_path, split="test")


def test_control_maps_named_by_plain_paths(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 2, control=True)
    text = (folder / "metadata.jsonl").read_text().replace("edges_file_name", "edges")
    (folder / "metadata.jsonl").write_text(text)
    (batch,) = itertools.islice(opened(folder, 2, control_column="edges"), 1)
    assert (batch["control"] - batch["pixels"]).abs().mean() < 0.05


def test_pictures_in_a_zip(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 2)
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed/pictures.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    batches = opened(tmp_path / "packed", 2, shuffle=False)
    (batch,) = itertools.islice(batches, 1)
    assert batches.counts.summary() == {"broken_pictures": 0, "without_caption": 0}
    assert batch["ids"] == ["row 0", "row 1"]


def test_records_are_in_order_in_the_middle_and_not_mirrored(damaged: Path) -> None:
    config = DataConfig(str(damaged), resolution=making.SIZE, fit="random-crop", flip=True)
    found = records(config)
    for _ in range(2):
        assert [(r.id, r.caption, r.control) for r in found] == [("003.png", "", None), ("006.png", "caption 6", None)]
    assert found.counts.summary() == {"broken_pictures": 6, "without_caption": 1}
    plain = records(DataConfig(str(damaged), resolution=making.SIZE))
    assert [r.image.tobytes() for r in found] == [r.image.tobytes() for r in plain]
