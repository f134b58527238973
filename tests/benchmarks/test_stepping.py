"""Ways of serving are compared under the same arrivals, and the step engine's own cost with diffusers' loop."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks import step_overhead, stepping
from benchmarks.stepping import Arrival, Kind, Served, by_request, one_by_one, serve, summary
from tests.icexport.runtime.test_step_engine import request
from tests.icexport.runtime.toy_engines import Toys, ToyUNet

ROW = 0.002


class SlowUNet(ToyUNet):
    """A UNet that takes as long as a CPU does: in proportion to its rows."""

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Predict, after a while."""
        time.sleep(ROW * len(inputs["sample"]))
        return super().__call__(inputs, outputs)


def slow() -> Toys:
    toys = Toys()
    toys.unet = SlowUNet()
    toys.engine._models._unet = toys.unet
    return toys


def arrival(steps: int, due: float, strength: float = 1.0) -> Arrival:
    return Arrival(Kind(steps, "DDIM", 4.0, strength), request(steps, steps=steps, scale=strength), due)


def test_by_step_nobody_waits_for_the_end_of_another_picture() -> None:
    arrivals = [arrival(50, 0.0), arrival(4, 0.01)]
    served = {
        name: serve(slow().engine, arrivals, batch)
        for name, batch in (("by step", None), ("by request", by_request(4)), ("one by one", one_by_one))
    }
    together, alone = served["by step"].latencies, served["one by one"].latencies
    assert together[1] < 0.3 * alone[1]
    assert served["by request"].latencies[1] > 50 * 2 * ROW - 0.02
    assert set(served["one by one"].pictures) == {1}
    assert max(served["by step"].pictures) == 2


def test_by_request_equal_settings_are_drawn_together() -> None:
    arrivals = [arrival(4, 0.0), arrival(4, 0.0, 0.5), arrival(4, 0.0), arrival(4, 0.0), arrival(4, 0.0)]
    assert [len(by_request(3)(arrivals)), by_request(3)(arrivals[1:])] == [3, [arrivals[1]]]
    assert serve(slow().engine, arrivals, by_request(3)).pictures == [3] * 4 + [1] * 4 + [1] * 4


def test_the_summary_counts_by_steps() -> None:
    arrivals = [arrival(4, float(i)) for i in range(20)] + [arrival(10, 20.0)]
    served = Served([float(i) for i in range(21)], 42.0, [1, 2, 3])
    found = summary(arrivals, {"by step": served})["by step"]
    assert found["latency"]["4"] == {"requests": 20, "p50": 10.0, "p95": 19.0, "p99": 19.0}
    assert found["latency"]["10"]["p50"] == 20.0
    assert (found["pictures per second"], found["pictures per call"], found["calls"]) == (0.5, 2.0, 3)


def test_the_command(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stepping, "STEPS", (2, 4))
    options = ["--output", str(tmp_path / "out"), "--requests", "6", "--share", "3", "--backend", "onnxruntime"]
    assert stepping.main([str(tiny_bundle), *options]) == 0
    found = json.loads((tmp_path / "out" / "stepping.json").read_text())
    assert found["ways"].keys() == {"by step", "by request", "one by one"}
    assert sum(row["requests"] for row in found["ways"]["by step"]["latency"].values()) == 6
    assert found["ways"]["one by one"]["pictures per call"] == 1
    assert (tmp_path / "out" / "stepping.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "out" / "stepping.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [["--requests", "0"], ["--share", "0"]])
def test_wrong_options(tiny_bundle: Path, tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        stepping.main([str(tiny_bundle), "--output", str(tmp_path), *options])
    assert caught.value.code == 2


def test_the_step_engines_own_cost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step_overhead, "_SIDE", 64)
    monkeypatch.setattr(step_overhead, "_STEPS", 5)
    assert step_overhead.main(["--rounds", "1"]) == 0
    *_, document = capsys.readouterr().out.splitlines()
    rows = json.loads(document)["rows"]
    assert len(rows) == 15
    assert all(row["step engine ms"] > 0 and row["diffusers ms"] > 0 for row in rows)
