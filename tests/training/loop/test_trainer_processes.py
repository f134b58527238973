"""Two processes on the CPU, started as users start them; and what signals do to a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.toy_task import CONFIG, ROOT, ToyBatches, ToyTask
from training.loop.trainer import TrainerConfig, train

TORCHRUN = ("torch.distributed.run", "--standalone")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"),
    *("--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"),
)
"""Accelerate starts one process for ``--cpu``; without a GPU, those of ``--multi_gpu`` train on the CPU."""
FILES = ("checkpoints/step-00000030/model", "checkpoints/step-00000030/ema", "checkpoints/step-00000030/optimizer")


def launch(launcher: tuple[str, ...], runs: list[dict[str, Any]]) -> str:
    """What all processes printed."""
    command = [sys.executable, "-m", *launcher, "-m", "tests.training.toy_task", json.dumps(runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of all runs, and what the second launch printed."""
    folder = tmp_path_factory.mktemp("runs")
    plain = {"task": {"dropout": 0, "noise": 0}}
    stopped = {"data": {"stop_at": 19}}
    launch(
        (*TORCHRUN, "--nproc_per_node=2"),
        [
            {"output": str(folder / "whole")},
            {"output": str(folder / "cut")} | stopped,
            {"output": str(folder / "plain")} | plain,
        ],
    )
    printed = launch(
        ACCELERATE,
        [
            {"output": str(folder / "cut")},
            {"output": str(folder / "nan"), "data": {"bad_at": 9}},
            {"output": str(folder / "sharded"), "fsdp": True},
            {"output": str(folder / "sharded-cut"), "fsdp": True} | stopped,
            {"output": str(folder / "sharded-cut"), "fsdp": True},
        ],
    )
    return folder, printed


def tensors(folder: Path) -> dict[str, Tensor]:
    names = (*FILES, "toy/net", "toy-live/net")
    return {f"{n}/{k}": v for n in names for k, v in load_file(folder / f"{n}.safetensors").items()}


def losses(folder: Path) -> list[tuple[float, ...]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["odd"], row["gradient_norm"]) for row in found]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_repeats_the_uninterrupted_one(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    assert equal(tensors(folder / "whole"), tensors(folder / "cut"))
    assert losses(folder / "whole") == losses(folder / "cut")


@pytest.mark.slow
def test_sums_over_three_processes_are_in_the_same_order_after_resuming(tmp_path: Path) -> None:
    task = {"task": {"width": 4096}}
    runs = [
        {"output": str(tmp_path / "whole")} | task,
        {"output": str(tmp_path / "cut"), "data": {"stop_at": 19}} | task,
        {"output": str(tmp_path / "cut")} | task,
    ]
    launch((*TORCHRUN, "--nproc_per_node=3"), runs)
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_every_process_resumes_its_own_share_of_the_data(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    state = json.loads((folder / "whole" / "checkpoints" / "step-00000030" / "state.json").read_text())
    assert state["data"] == [{"number": 30}, {"number": 30}]
    assert state["settings"]["processes"] == 2


def test_two_processes_are_a_larger_batch(runs: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = runs
    train(ToyTask(0, 0), ToyBatches(size=8), TrainerConfig(**CONFIG), tmp_path)
    one, two = tensors(tmp_path), tensors(folder / "plain")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)
    for a, b in zip(losses(tmp_path), losses(folder / "plain"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_processes_draw_different_noise(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    assert losses(folder / "whole")[0] != pytest.approx(losses(folder / "plain")[0], rel=1e-3)


def test_all_processes_stop_together_when_one_finds_a_loss_that_is_not_finite(runs: tuple[Path, str]) -> None:
    folder, printed = runs
    lines = [line for line in printed.splitlines() if "not finite" in line]
    assert len(lines) == 2
    for line in lines:
        assert "step 10:" in line
        assert "process 0: losses" in line
        assert "process 1: losses" in line
        assert "76.png, 77.png, 78.png, 79.png" in line  # of process 1
        assert "step-00000008" in line
    assert not (folder / "nan" / "toy").exists()


def test_sharded_training_computes_the_same(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    whole, sharded = tensors(folder / "whole"), tensors(folder / "sharded")
    assert whole.keys() == sharded.keys()  # files do not show how many processes held what
    assert all(torch.allclose(whole[name], sharded[name], rtol=1e-4, atol=1e-6) for name in whole)


def test_a_resumed_sharded_run_repeats_the_uninterrupted_one(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    assert equal(tensors(folder / "sharded"), tensors(folder / "sharded-cut"))
    assert losses(folder / "sharded") == losses(folder / "sharded-cut")


def test_a_signal_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    config = {"steps": 100_000, "checkpoint_every": 5, "log_every": 1}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        arguments = [{"output": str(tmp_path / number.name), "data": {"pause": 0.02}, "config": config}]
        command = [sys.executable, "-m", "tests.training.toy_task", json.dumps(arguments)]
        started[number] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for number, process in started.items():
        folder = tmp_path / number.name
        while not list(folder.glob("checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=300)
        assert printed == f"interrupted {'SIGTERM' if number == signal.SIGTERM else ''}\n"
        rows = (folder / "log.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, len(rows) + 1))
        last = int(max(p.name for p in folder.glob("checkpoints/step-*")).removeprefix("step-"))
        assert last > len(rows) - 2 * config["checkpoint_every"]
        settings = TrainerConfig(**CONFIG | config | {"steps": last + 1})
        assert train(ToyTask(), ToyBatches(), settings, folder).step == last + 1
