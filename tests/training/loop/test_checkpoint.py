from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from icexport.errors import CheckpointError, IcexportError
from training.loop import checkpoint
from training.loop.checkpoint import Checkpoint, Checkpoints, gather_model, gather_optimizer, replacing, restore

TENSORS = {"model": {"w": torch.arange(4.0)}, "ema": {}, "optimizer": {"w/step": torch.tensor(3.0)}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was_written(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    checkpoints.write(3, TENSORS, {"data": [{"number": 1}], "sum": 0.1 + 0.2})
    found = checkpoints.newest()
    assert found is not None
    assert names(found.path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert torch.equal(found.tensors["model"]["w"], torch.arange(4.0))
    assert (found.state["step"], found.state["data"], found.state["sum"]) == (3, [{"number": 1}], 0.1 + 0.2)


def test_only_the_newest_checkpoints_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 100, 1000):
        checkpoints.write(step, TENSORS, {})
    assert names(checkpoints.folder) == ["step-00000100", "step-00001000"]


def test_a_full_disk_leaves_the_checkpoint_before(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(5, TENSORS, {})
    written = []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"half")
        written.append(path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(IcexportError, match=r"step-00000010.*No space left.*last good checkpoint is .*step-00000005"):
        checkpoints.write(10, TENSORS, {})
    assert written
    assert names(checkpoints.folder) == ["step-00000005"]
    assert checkpoints.newest() is not None


def test_a_disk_that_refuses_inside_safetensors_is_the_same(checkpoints: Checkpoints) -> None:
    checkpoints.write(5, TENSORS, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(IcexportError, match=r"step-00000010.*File too large.*step-00000005"):
            checkpoints.write(10, {"model": {"w": torch.zeros(1 << 17)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(checkpoints.folder) == ["step-00000005"]


def test_an_interruption_while_writing_leaves_nothing_behind(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(5, TENSORS, {})
    assert names(checkpoints.folder) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (flip, "model.safetensors", "model.safetensors was changed"),
        (cut, "optimizer.safetensors", "optimizer.safetensors was changed"),
        (Path.unlink, "optimizer.safetensors", "No such file"),
        (Path.unlink, "state.json", "No such file"),
        (cut, "state.json", "JSONDecodeError"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    checkpoints: Checkpoints, damage: Any, file: str, message: str
) -> None:
    checkpoints.write(5, TENSORS, {})
    checkpoints.write(10, TENSORS, {})
    damage(checkpoints.folder / "step-00000010" / file)
    with pytest.raises(CheckpointError, match=rf"step-00000010 is damaged.*{message}.*from .*step-00000005"):
        checkpoints.newest()


def test_a_checkpoint_of_another_format_is_refused(checkpoints: Checkpoints) -> None:
    checkpoints.write(5, TENSORS, {})
    path = checkpoints.folder / "step-00000005" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoints.newest()


def test_a_folder_is_replaced_in_one_go(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with replacing(target) as folder:
        (folder / "a").touch()
        assert not target.exists()
    with pytest.raises(FileNotFoundError), replacing(target) as folder:
        (folder / "b" / "c").touch()
    assert names(target) == ["a"]
    with replacing(target) as folder:
        (folder / "c").touch()
    assert names(target) == ["c"]
    assert names(tmp_path) == ["result"]


def trained(updates: int, width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(updates):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(folder: Path, updates: int) -> Checkpoint:
    model, optimizer = trained(updates)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.write(updates, {"model": gather_model(model), "optimizer": gather_optimizer(model, optimizer)}, {})
    found = checkpoints.newest()
    assert found is not None
    return found


def test_model_and_optimiser_come_back_with_their_counters(tmp_path: Path) -> None:
    found = saved(tmp_path, 3)
    assert found.tensors["optimizer"]["0.weight/step"] == 3
    model, optimizer = trained(0)
    restore(model, optimizer, found)
    want_model, want_optimizer = trained(3)
    for found_model, found_optimizer in ((model, optimizer), (want_model, want_optimizer)):
        torch.manual_seed(1)
        found_model(torch.randn(8, 3)).square().mean().backward()
        found_optimizer.step()
    assert all(map(torch.equal, model.parameters(), want_model.parameters()))
    assert optimizer.state[model[0].weight]["step"] == 4
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(*trained(0, width=5), saved(tmp_path, 1))


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    model, _ = trained(0)
    with pytest.raises(CheckpointError, match="does not fit.*square_avg"):
        restore(model, torch.optim.RMSprop(model.parameters()), saved(tmp_path, 1))


def test_files_are_plain_safetensors(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, TENSORS, {})
    assert set(load_file(checkpoints.folder / "step-00000001" / "model.safetensors")) == {"w"}


def test_tensors_may_share_memory(checkpoints: Checkpoints) -> None:
    table = torch.arange(4.0)
    checkpoints.write(1, {"optimizer": {"a/qmap": table, "b/qmap": table, "c/qmap": table[1:]}}, {})
    found = load_file(checkpoints.folder / "step-00000001" / "optimizer.safetensors")
    assert [found[name].tolist() for name in sorted(found)] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]]
