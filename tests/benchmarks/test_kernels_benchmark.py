"""Predictions, the official head, tuning tables, and the benchmark's command line; the timings need a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks.gpu import measure, prediction, tune
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.official import OfficialHead
from benchmarks.gpu.timing import Bench, Spread, ceilings
from engines.errors import EngineError
from engines.kernels import SPECS, tuning
from engines.kernels.spec import Case
from engines.kernels.tuning import LaunchConfig
from icexport.models.probe import InnerControlProbe, ProbeConfig

CONFIG = LaunchConfig({"BLOCK": 512}, 1, 4, 1, False)


def test_official_head_is_the_probe() -> None:
    torch.manual_seed(0)
    config = ProbeConfig((24, 32, 12), projection_dim=32, num_groups=4, head_dims=(8, 4), time_embed_dim=20)
    probe = InnerControlProbe(config).double().eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn_like(parameter))
        taps = [torch.randn(2, dim, side, side).double() for dim, side in zip(config.dims, (2, 4, 8), strict=True)]
        embedding = torch.randn(1, 20).double()
        torch.testing.assert_close(OfficialHead.of(probe)(taps, embedding), probe(taps, embedding))


def test_predicted_arithmetic_is_the_known_one() -> None:
    found = prediction.operations(batch=2)
    flops = {name: sum(operation.matrix_flops for operation in ops) for name, ops in found.items()}
    # Counted by other means, for batch 2.
    assert flops["official"] == pytest.approx(78.37e9, rel=1e-3)
    assert flops["reordered"] == pytest.approx(38.74e9, rel=1e-3)
    assert flops["fused"] == flops["reordered"]


def test_fused_head_has_five_kernels_of_its_own_a_tap() -> None:
    names = [operation.name for operation in prediction.operations()["fused"]]
    counts = {name: names.count(name) for name in SPECS}
    assert counts == {
        "dual_projection": 18,
        "resize_group_norm_relu": 18,
        "residual_mix": 9,
        "fidelity_reduce": 0,
    }


def test_traffic_counts_inputs_and_outputs_once() -> None:
    (first, *_) = [o for o in prediction.operations()["official"] if o.name == "upsample_bilinear2d"]
    assert first.bytes == 2 * 1280 * (16 * 16 + 64 * 64)


def test_floor_is_the_slowest_of_traffic_and_work() -> None:
    device = dataclasses.replace(prediction.DEVICES["h200"], bandwidth=10.0, matrix_rate=100.0, vector_rate=4.0)
    assert prediction.Operation("a", "", 50, 100, 4).floor(device) == 5
    assert prediction.Operation("a", "", 50, 700, 4).floor(device) == 7
    assert prediction.Operation("a", "", 50, 100, 36).floor(device) == 9


def test_committed_prediction_is_what_the_code_predicts(tmp_path: Path) -> None:
    for path in kernels.write_prediction("h200", tmp_path):
        committed = ROOT / "benchmarks" / "results" / path.name
        assert committed.read_text() == path.read_text(), "run: python -m benchmarks.kernels --predict h200"


def test_a_prediction_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--predict", "h200", "--output", str(tmp_path)]) == 0
    data, text = (Path(line).read_text() for line in capsys.readouterr().out.split())
    assert "nothing here was measured" in json.loads(data)["title"]
    assert text.startswith("# Prediction for an H200: nothing here was measured")
    assert "data sheet" in text


@pytest.mark.parametrize("arguments", [[], ["--tune"]])
def test_without_a_gpu(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main(arguments) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err


def test_rows_of_a_dry_run() -> None:
    rows = list(kernels.run(Bench("cpu")))
    assert {row.name for row in rows} == {"ceiling", "probe_head", *SPECS}
    heads = {row.provider for row in rows if row.name == "probe_head"}
    assert {name.partition(",")[0] for name in heads} == {"official", "reordered", "fused"}
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.n >= 20
        assert json.loads(json.dumps(dataclasses.asdict(row)))["torch"] == torch.__version__


def test_bandwidth_is_traffic_over_time() -> None:
    class Fixed(Bench):
        def seconds(self, call: Any, *, flush: bool = True, least: int = 1) -> Spread:
            return Spread(2e-3, 1e-3, 4e-3, 5)

    bench = Fixed("cpu")
    spec, case = SPECS["dual_projection"], SPECS["dual_projection"].cases[0]
    limits = dataclasses.replace(ceilings(bench), copy=Spread(1e6, 1e6, 1e6, 1), matmul=Spread(1e9, 1e9, 1e9, 1))
    call = measure.kernel_calls(spec, case, bench)["torch-eager"]
    rows = {row.metric: row for row in measure.kernel_rows(spec, case, "torch-eager", call, bench, limits)}
    traffic, flops = 2 * (2 * 63 * (70 + 37) + 70 * 37), 2 * 2 * 70 * 37 * 63
    assert rows["time from memory"].p50 == pytest.approx(2000)
    assert rows["bandwidth"].p50 == pytest.approx(1e-9 * traffic / 2e-3)
    assert rows["bandwidth"].p20 < rows["bandwidth"].p50 < rows["bandwidth"].p80
    assert rows["share of copy"].p50 == pytest.approx(100 * traffic / 2e-3 / 1e6)
    assert rows["share of matmul"].p50 == pytest.approx(100 * flops / 2e-3 / 1e9)


def test_official_part_of_a_tap_convolves_the_resized_tap() -> None:
    bench, spec = Bench("cpu"), SPECS["dual_projection"]
    case = Case(1, (640, 4, 4), (480, 4, 4))
    calls = measure.kernel_calls(spec, case, bench)
    assert calls["official"]().shape == (1, 384, 8, 8)
    assert "official" not in measure.kernel_calls(spec, Case(1, (96, 4, 4), (384, 4, 4)), bench)


def test_goals_of_the_head() -> None:
    times = {"fused, CUDA graph": 10.0, "official": 31.0, "reordered, torch.compile": 12.0}
    goals = measure.head_goals(times)
    assert [(goal["met"], goal["value"]) for goal in goals.values()] == [(True, 3.1), (False, 1.2)]


def best_of(**wanted: int) -> Any:
    """Seconds that grow with the distance from the wanted values."""

    def time(config: LaunchConfig) -> float:
        values = {**config.constants, **dataclasses.asdict(config)}
        return 1.0 + sum(abs(math.log2(values[name] / value)) for name, value in wanted.items())

    return time


def test_descent_finds_the_best_of_each_axis() -> None:
    found = tune.descend("fidelity_reduce", CONFIG, best_of(BLOCK=2048, num_warps=8))
    assert found == LaunchConfig({"BLOCK": 2048}, 1, 8, 1, True)
    start = LaunchConfig({"BLOCK_C": 4, "BLOCK_P": 512, "ROWS": 1024, "CELLS": 256}, 1, 8, 1, False)
    found = tune.descend("residual_mix", start, best_of(BLOCK_C=16, CELLS=128, split=4, num_warps=16))
    assert found == dataclasses.replace(
        start, constants={**start.constants, "BLOCK_C": 16, "CELLS": 128}, split=4, num_warps=16, measured=True
    )


def test_descent_leaves_a_start_that_does_not_run() -> None:
    found = tune.descend("fidelity_reduce", CONFIG, lambda c: math.inf if c.constants["BLOCK"] < 1024 else 1.0)
    assert found.constants["BLOCK"] == 1024
    with pytest.raises(EngineError, match="no launch configuration of fidelity_reduce runs"):
        tune.descend("fidelity_reduce", CONFIG, lambda _: math.inf)


def test_tables_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tune.FOLDER / "fidelity_reduce.json"
    shutil.copy(source, tmp_path)
    small, large = (dataclasses.replace(CONFIG, constants={"BLOCK": size}) for size in (256, 2048))
    found = [tune.Best(100, 4, small), tune.Best(400, 4, small), tune.Best(1600, 4, large)]
    path = tune.write(tmp_path, "fidelity_reduce", 121, tune.rows(found))
    before, after = (json.loads(file.read_text())["tables"] for file in (source, path))
    assert after.pop("121") == {
        "measured": True,
        "rows": [
            {
                "size": 800,
                "element_bytes": 4,
                "constants": {"BLOCK": 256},
                "split": 1,
                "num_warps": 4,
                "num_stages": 1,
            },
            {
                "size": None,
                "element_bytes": 4,
                "constants": {"BLOCK": 2048},
                "split": 1,
                "num_warps": 4,
                "num_stages": 1,
            },
        ],
    }
    assert after == before
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    tuning._tables.cache_clear()
    tuning.choose.cache_clear()
    try:
        assert tuning.choose("fidelity_reduce", 121, 400, 4) == dataclasses.replace(small, measured=True)
        assert tuning.choose("fidelity_reduce", 121, 801, 4) == dataclasses.replace(large, measured=True)
    finally:
        tuning._tables.cache_clear()
        tuning.choose.cache_clear()


def test_the_widest_measured_elements_stand_for_wider_ones() -> None:
    half, full = (tune.Best(100, width, CONFIG) for width in (2, 4))
    assert [row["element_bytes"] for row in tune.rows([half])] == [4]
    assert [row["element_bytes"] for row in tune.rows([half, full])] == [2, 4]


@pytest.mark.parametrize("op", SPECS)
def test_writing_keeps_the_layout_of_a_table(op: str, tmp_path: Path) -> None:
    shutil.copy(tune.FOLDER / f"{op}.json", tmp_path)
    path = tmp_path / f"{op}.json"
    capability, table = next(iter(json.loads(path.read_text())["tables"].items()))
    tune.write(tmp_path, op, int(capability), table["rows"])
    assert path.read_text() == (tune.FOLDER / f"{op}.json").read_text().replace(
        f'"{capability}": {{\n      "measured": false', f'"{capability}": {{\n      "measured": true'
    )


class _Timed(Bench):
    """Whose time is what the kernel looks up while it runs: the more a block, the faster."""

    def seconds(self, call: Any, *, flush: bool = True, least: int = 1) -> Spread:
        call()
        seconds = 1 / tuning.choose("fidelity_reduce", None, 0, 4).constants["BLOCK"]
        return Spread(seconds, seconds, seconds, 1)


def fake_spec(wrong: bool = False) -> Any:
    """`fidelity_reduce` with one large case, on the CPU."""
    spec = SPECS["fidelity_reduce"]

    def run(reading: Tensor, target: Tensor) -> Tensor:
        config = tuning.choose("fidelity_reduce", None, len(target) * target[0, 0].numel(), 4)
        return spec.reference(reading, target) * (1 + (wrong and config.constants["BLOCK"] == 2048))

    case = Case(2, (1, 8, 8), (3, 16, 16), large=True)
    return dataclasses.replace(spec, cases=(spec.cases[0], case), op=run, run_kernel=run)


def test_tuning_measures_what_it_chooses() -> None:
    texts: list[str] = []
    (found,) = tune.tune(fake_spec(), _Timed("cpu"), texts.append)
    assert (found.size, found.element_bytes) == (512, 4)
    assert found.config.constants == {"BLOCK": 2048}
    assert len(texts) == 1


def test_tuning_refuses_a_fast_but_wrong_config() -> None:
    with pytest.raises(EngineError, match="is wrong"):
        tune.tune(fake_spec(wrong=True), _Timed("cpu"), lambda _: None)
