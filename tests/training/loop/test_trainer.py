from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from icexport.errors import CheckpointError, IcexportError, UsageError
from tests.training.toy_task import CONFIG, ToyBatches, ToyTask
from training.loop import checkpoint, optimizers
from training.loop.ema import Ema
from training.loop.meter import Meter, NonFiniteError
from training.loop.trainer import Batch, TrainerConfig, train
from training.seeds import mix_seed

BASE = TrainerConfig(**CONFIG)


def rows(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_second"} for row in lines]


def state(folder: Path, step: int, file: str) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_run(a: Path, b: Path) -> bool:
    """Same result, same checkpoint and same log, to the last bit."""
    results = all(
        equal(load_file(a / name / "net.safetensors"), load_file(b / name / "net.safetensors"))
        for name in ("toy", "toy-live")
    )
    return (
        results
        and all(equal(state(a, 30, f), state(b, 30, f)) for f in ("model", "ema", "optimizer"))
        and (rows(a) == rows(b))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    train(ToyTask(), ToyBatches(), BASE, folder)
    return folder


def test_training_learns_and_tells(tmp_path: Path) -> None:
    config = replace(BASE, steps=300, log_every=100, checkpoint_every=300)
    task = ToyTask(dropout=0, noise=0)
    result = train(task, ToyBatches(size=16), config, tmp_path)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [100, 200, 300]
    assert found[-1]["loss"] < 0.05 * found[0]["loss"]
    assert found[-1]["odd"] == pytest.approx(1 + found[-1]["loss"], abs=0.02)
    assert found[-1]["lr"] == config.rate(299)
    assert (result.step, result.losses["loss"], result.output) == (300, found[-1]["loss"], tmp_path)
    assert result.pictures_per_second > 0
    live = load_file(tmp_path / "toy-live" / "net.safetensors")
    assert equal(live, task.net.state_dict())
    assert not equal(live, load_file(tmp_path / "toy" / "net.safetensors"))


def test_losses_of_the_log_are_means_over_the_steps_that_have_them(tmp_path: Path, whole: Path) -> None:
    seen: list[dict[str, float]] = []

    class Recorder(ToyTask):
        def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            losses = super().forward(batch, generator)
            seen.append({k: v.item() for k, v in losses.items()})
            return losses

    train(Recorder(), ToyBatches(), BASE, tmp_path)
    for row, start in zip(rows(tmp_path), range(0, 30, 6), strict=True):
        interval = seen[start : start + 6]
        odd = [losses["odd"] for losses in interval if "odd" in losses]
        assert len(odd) == 3
        assert row["odd"] == pytest.approx(sum(odd) / 3)
        assert row["loss"] == pytest.approx(sum(losses["loss"] for losses in interval) / 6)
    assert rows(tmp_path) == rows(whole)


@pytest.mark.parametrize("stop_at", [3, 8, 19, 29])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, whole: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ToyTask(), ToyBatches(stop_at=stop_at), BASE, tmp_path)
    assert not (tmp_path / "toy").exists()
    train(ToyTask(), ToyBatches(), BASE, tmp_path)
    assert same_run(whole, tmp_path)


def test_the_seed_decides_the_noise(tmp_path: Path, whole: Path) -> None:
    train(ToyTask(), ToyBatches(), replace(BASE, seed=8), tmp_path)
    assert rows(tmp_path)[0]["loss"] != rows(whole)[0]["loss"]


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    first = train(ToyTask(), ToyBatches(), BASE, tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    again = train(ToyTask(), ToyBatches(stop_at=30), BASE, tmp_path)
    assert (again.step, again.losses) == (30, first.losses)
    assert (tmp_path / "log.jsonl").read_text() == log
    longer = train(ToyTask(), ToyBatches(), replace(BASE, steps=40, log_every=5, keep_checkpoints=1), tmp_path)
    assert longer.step == 40
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000040"]


def test_resuming_with_other_settings_is_refused_and_says_which(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(UsageError, match=r"learning_rate was 0.02 and is 0.01; task.noise was 0.1 and is 0.5"):
        train(ToyTask(noise=0.5), ToyBatches(), replace(BASE, learning_rate=0.01), whole)
    with pytest.raises(UsageError, match="holds a run already"):
        train(ToyTask(), ToyBatches(), BASE, whole, resume=False)
    (tmp_path / "toy").mkdir()
    with pytest.raises(UsageError, match="toy exists"):
        train(ToyTask(), ToyBatches(), BASE, tmp_path)


def test_a_damaged_checkpoint_is_not_skipped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ToyTask(), ToyBatches(stop_at=20), BASE, tmp_path)
    path = tmp_path / "checkpoints" / "step-00000016" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="step-00000016 is damaged"):
        train(ToyTask(), ToyBatches(), BASE, tmp_path)


def test_a_row_that_a_crash_cut_short_is_written_again(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(ToyTask(), ToyBatches(stop_at=20), BASE, tmp_path)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2')
    train(ToyTask(), ToyBatches(), BASE, tmp_path)
    assert rows(tmp_path) == rows(whole)


def test_a_loss_that_is_not_finite_stops_with_step_and_pictures(tmp_path: Path) -> None:
    config = replace(BASE, accumulation=2, log_every=6, checkpoint_every=5)
    with pytest.raises(NonFiniteError) as caught:
        train(ToyTask(), ToyBatches(bad_at=13), config, tmp_path)
    message = str(caught.value)
    assert "step 7:" in message  # the 14th micro step
    assert "52.png, 53.png, 54.png, 55.png" in message
    assert "51.png" not in message
    assert "'loss': nan" in message
    assert f"{tmp_path / 'checkpoints' / 'step-00000005'}" in message
    assert isinstance(caught.value, IcexportError)
    assert all(t.isfinite().all() for t in state(tmp_path, 5, "model").values())
    assert not (tmp_path / "checkpoints" / "step-00000010").exists()
    assert not (tmp_path / "toy").exists()


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is(tmp_path: Path) -> None:
    class Cliff(ToyTask):
        def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            losses = super().forward(batch, generator)
            steep = (self.net[0].weight * 0).sum().abs().sqrt()  # 0, with an infinite slope
            return {"loss": losses["loss"] + steep} if batch["number"] == 3 else losses

    with pytest.raises(
        NonFiniteError, match=r"step 4:.*gradient norm nan after the pictures 12.png.*no checkpoint yet"
    ):
        train(Cliff(), ToyBatches(), BASE, tmp_path)


def test_overflows_of_fp16_are_no_faults_until_they_do_not_end() -> None:
    accelerator: Any = SimpleNamespace(
        mixed_precision="fp16", device=torch.device("cpu"), process_index=0, num_processes=1
    )
    meter = Meter(accelerator)

    def updates(count: int, norm: float) -> None:
        for _ in range(count):
            meter.add(len(norms) + 1, ["a.png"], {"loss": torch.tensor(1.0)})
            meter.add_norm(torch.tensor(norm))
            norms.append(norm)
        meter.collect("")

    norms: list[float] = []
    updates(19, math.inf)
    updates(1, 2.0)
    updates(19, math.inf)
    assert meter.take() == {"loss": 1.0, "gradient_norm": 2.0}
    with pytest.raises(NonFiniteError, match="step 40:.*gradient norm inf after the pictures a.png"):
        updates(1, math.inf)


def test_a_full_disk_stops_with_the_last_good_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real, calls = checkpoint.save_file, []

        def full(tensors: dict[str, Tensor], path: Path) -> None:
            calls.append(path)
            if len(calls) == 5:  # the second file of the second checkpoint
                raise OSError(errno.ENOSPC, "No space left on device")
            real(tensors, path)

        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(IcexportError, match="step-00000016 could not be written.*step-00000008"):
            train(ToyTask(), ToyBatches(), BASE, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]
    train(ToyTask(), ToyBatches(), BASE, tmp_path)
    assert same_run(whole, tmp_path)


def test_averages_follow_the_formula_and_stay_apart(tmp_path: Path) -> None:
    lives: list[dict[str, Tensor]] = []

    class Recorder(ToyTask):
        def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            lives.append({k: v.detach().clone() for k, v in self.net.state_dict().items()})
            return super().forward(batch, generator)

    train(Recorder(), ToyBatches(), replace(BASE, ema_decay=0.5), tmp_path)
    lives.append(load_file(tmp_path / "toy-live" / "net.safetensors"))
    mean = {k: v.double() for k, v in lives[0].items()}
    for n, live in enumerate(lives[1:]):
        d = min(0.5, (1 + n) / (10 + n))
        mean = {k: d * v + (1 - d) * live[k] for k, v in mean.items()}
    found = load_file(tmp_path / "toy" / "net.safetensors")
    assert all(torch.allclose(found[k].double(), v, atol=1e-6) for k, v in mean.items())


def test_warm_up_of_the_averages() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0)
        ema = Ema(module, decay=0.9)
        module.weight.fill_(1)
    ema.update(0)
    assert ema.state_dict()["weight"].item() == pytest.approx(0.9)
    ema.update(10**6)
    assert ema.state_dict()["weight"].item() == pytest.approx(0.91)
    assert module.weight.item() == 1


def test_validation_gets_the_averages_and_changes_nothing(tmp_path: Path, whole: Path) -> None:
    task = ToyTask()
    train(task, ToyBatches(), replace(BASE, validate_every=8), tmp_path)
    assert same_run(whole, tmp_path)
    assert rows(tmp_path, "validation.jsonl") == [{"step": s, "error": s / 100} for s in (8, 16, 24, 30)]
    assert (tmp_path / "validation" / "step-00000030" / "picture.txt").read_text() == "step 30"
    assert equal(task.validated[-1], state(tmp_path, 30, "ema"))
    assert equal(task.validated[-2], state(tmp_path, 24, "ema"))


def test_a_copy_of_a_task_shares_what_is_frozen() -> None:
    task = ToyTask()
    copy = task.copy()
    assert copy.frozen.net is task.frozen.net
    assert copy.net[0].weight is not task.net[0].weight
    assert not copy.training
    assert task.training
    assert task.net[0].weight.requires_grad


def test_without_averages_the_result_is_the_live_network(tmp_path: Path) -> None:
    task = ToyTask()
    train(task, ToyBatches(), replace(BASE, ema_decay=None), tmp_path)
    assert equal(load_file(tmp_path / "toy" / "net.safetensors"), task.net.state_dict())
    assert not (tmp_path / "toy-live").exists()
    assert not (tmp_path / "checkpoints" / "step-00000030" / "ema.safetensors").exists()


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    config = replace(BASE, ema_decay=None, warmup=0)
    train(ToyTask(0, 0), ToyBatches(size=8), config, tmp_path / "one")
    train(ToyTask(0, 0), ToyBatches(size=4), replace(config, accumulation=2), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "toy" / "net.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], rtol=1e-5, atol=1e-6) for k in one)
    assert not equal(one, ToyTask(0, 0).net.state_dict())
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)


def test_trackers_get_losses_and_validation(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(ToyTask(), ToyBatches(), replace(BASE, trackers=("tensorboard",), validate_every=15), tmp_path)
    events = EventAccumulator(str(tmp_path / "tracking" / "toy"))
    events.Reload()
    assert {"loss", "odd", "lr", "gradient_norm", "validation/error"} <= set(events.Tags()["scalars"])
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(r["step"], pytest.approx(r["loss"])) for r in rows(tmp_path)]


def test_a_tracker_that_is_missing_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pip install comet_ml"):
        train(ToyTask(), ToyBatches(), replace(BASE, trackers=("comet_ml",)), tmp_path)
    with pytest.raises(UsageError, match="Unsupported logging"):
        train(ToyTask(), ToyBatches(), replace(BASE, trackers=("paper",)), tmp_path)


def test_precision_that_the_device_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        train(ToyTask(), ToyBatches(), replace(BASE, precision="fp16"), tmp_path)


def test_only_float32_parameters_are_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must be float32.*net.0.weight \(torch.float16\)"):
        train(ToyTask().half(), ToyBatches(), BASE, tmp_path)
    with pytest.raises(UsageError, match="there are none"):
        train(ToyTask().requires_grad_(False), ToyBatches(), BASE, tmp_path)


def test_missing_bitsandbytes_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        optimizers.new_optimizer("adamw-8bit", [], torch.device("cpu"), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


def test_every_fault_of_a_configuration_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        TrainerConfig(steps=0, decay=0, ema_decay=1, optimizer="sgd", betas=(0.9, 1.0), log_every=0, warmup=-1)
    for name in ("steps is 0", "decay is 0", "ema_decay is 1", "optimizer is 'sgd'", "betas", "log_every", "warmup"):
        assert name in str(caught.value)


def test_schedules() -> None:
    config = TrainerConfig(steps=100, learning_rate=1.0, warmup=10, schedule="linear", decay=0.5)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(30) == 1.0
    assert config.rate(75) == pytest.approx(0.5)
    assert config.rate(99) == pytest.approx(0.02)
    cosine = replace(config, schedule="cosine", decay=1.0, warmup=0)
    assert cosine.rate(0) == 1.0
    assert cosine.rate(25) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert replace(config, schedule="constant").rate(99) == 1.0


def test_no_two_micro_steps_share_a_seed() -> None:
    seeds = [mix_seed(3, index) for index in range(50_000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    others = [mix_seed(4, index) for index in range(50_000)]
    assert len(set(seeds) & set(others)) < 10  # by chance 0.6
    draws = [torch.rand(1, generator=torch.Generator().manual_seed(mix_seed(0, i))).item() for i in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=0.03)
