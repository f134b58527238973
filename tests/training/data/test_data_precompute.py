from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from icexport import conditions
from icexport.errors import UsageError
from tests.training.data import making
from training.data import precompute as module
from training.data.config import DataConfig
from training.data.loading import open_data
from training.data.precompute import precompute
from training.data.records import records


def run(folder: Path, output: Path, cond: str = "canny", size: int = making.SIZE) -> int:
    return precompute(records(DataConfig(str(folder), resolution=size)), output, conditions.get(cond), (size, size))


def test_the_folder_can_be_trained_on(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 4, broken=[1], silent=[2])
    assert run(folder, tmp_path / "ready") == 3
    config = DataConfig(str(tmp_path / "ready"), resolution=making.SIZE, control_column="canny", shuffle=False)
    batches = open_data(config, making.tokenize, 3)
    (batch,) = itertools.islice(batches, 1)
    assert batch["ids"] == ["00000000.png", "00000002.png", "00000003.png"]
    assert batch["input_ids"].equal(making.tokenize(["caption 0", "", "caption 3"]))
    (record, *_) = records(DataConfig(str(folder), resolution=making.SIZE))
    with Image.open(tmp_path / "ready/canny/00000000.png") as control:
        assert control.tobytes() == conditions.get("canny").extract(record.image).tobytes()


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    folder, output = making.folder(tmp_path / "set", 4), tmp_path / "ready"
    run(folder, output)
    complete = (output / "metadata.jsonl").read_text()
    lines = complete.splitlines(keepends=True)
    (output / "metadata.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    (output / "00000001.png").write_bytes(b"must not be touched")
    (output / "00000003.png").unlink()
    assert run(folder, output) == 4
    assert (output / "metadata.jsonl").read_text() == complete
    assert (output / "00000001.png").read_bytes() == b"must not be touched"
    assert (output / "00000003.png").exists()


def test_another_condition_or_size_needs_another_folder(tmp_path: Path) -> None:
    folder = making.folder(tmp_path / "set", 1)
    run(folder, tmp_path / "ready")
    for cond, size in (("lineart", making.SIZE), ("canny", 2 * making.SIZE)):
        with pytest.raises(UsageError, match="another kind or size"):
            run(folder, tmp_path / "ready", cond, size)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = making.folder(tmp_path / "set", 2)
    arguments = ["precompute", str(folder), str(tmp_path / "ready"), "--cond", "canny", "--resolution", "16", "24"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    rows = [json.loads(line) for line in (tmp_path / "ready/metadata.jsonl").read_text().splitlines()]
    assert [row["canny_file_name"] for row in rows] == ["canny/00000000.png", "canny/00000001.png"]
    with Image.open(tmp_path / "ready/00000000.png") as image:
        assert image.size == (24, 16)
    monkeypatch.setattr(sys, "argv", ["precompute", str(tmp_path / "no"), str(tmp_path / "x"), "--cond", "canny"])
    with pytest.raises(SystemExit):
        module.main()
    assert "does not exist" in capsys.readouterr().err
