"""The suite's plumbing with phases of our own, and its real phases as far as a CPU carries them."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import models, phases, step, suite
from benchmarks.gpu.report import Context, NotAvailable, Report
from benchmarks.gpu.suite import Phase
from engines.kernels import SPECS

PHASES = """
import os, subprocess, sys, time
from benchmarks.gpu.report import NotAvailable

def note(context, name):
    with open(context.work / "runs", "a") as file:
        file.write(name + " ")

def environment(report, context):
    note(context, "environment")
    with report.item("gpu") as item:
        item.values |= {"gpu": "Some GPU 9000", "driver": "1.2", "versions": {"torch": "3"}}

def good(report, context):
    note(context, "good")
    with report.item("works") as item:
        item.values["answer"] = 42
        item.goals["speed"] = {"value": 1.0, "at_least": 2.0, "met": False}
    with report.item("lacking"):
        raise NotAvailable("no such library")

def bad(report, context):
    note(context, "bad")
    with report.item("breaks"):
        raise ValueError("seven is not six")
    with report.item("works") as item:
        item.values["answer"] = 1

def crash(report, context):
    with report.item("works"):
        pass
    os.abort()

def stray(report, context):
    raise KeyError("outside of any item")

def absent(report, context):
    with report.item("library"):
        raise NotAvailable("not installed")

def hang(report, context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with report.item("child") as item:
        item.values["pid"] = child.pid
    time.sleep(60)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes phases from the functions above."""
    (tmp_path / "fake_phases.py").write_text(PHASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda *names: [Phase(name, f"fake_phases:{name}", 1) for name in names]


def run(tmp_path: Path, found: list[Phase], *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and merged document."""
    arguments = ["--output", str(tmp_path / "out"), "--device", "cpu", *options]
    code = gpu_suite.main(arguments, found)
    merged = [path for path in (tmp_path / "out").glob("*.json") if path.stem not in {phase.name for phase in found}]
    assert len(merged) == 1
    return code, {"file": merged[0].name, **json.loads(merged[0].read_text())}


def runs(tmp_path: Path) -> list[str]:
    return (tmp_path / "out-work" / "runs").read_text().split()


def test_results_are_merged(tmp_path: Path, fakes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, merged = run(tmp_path, fakes("environment", "good", "absent"))
    assert code == 0
    assert merged["status"] == "ok"
    assert merged["file"] == f"some-gpu-9000-{merged['started'][:10]}.json"
    assert (merged["gpu"], merged["driver"], merged["versions"]) == ("Some GPU 9000", "1.2", {"torch": "3"})
    assert {"schema", "commit", "dirty", "sources", "device"} <= merged.keys()
    assert merged["goals"] == {"good: works: speed": {"value": 1.0, "at_least": 2.0, "met": False}}
    good = merged["phases"]["good"]
    assert good == json.loads((tmp_path / "out" / "good.json").read_text())
    works, lacking = good["items"]
    assert (works["status"], works["values"]) == ("ok", {"answer": 42})
    assert (lacking["status"], lacking["reason"]) == ("not available", "no such library")
    assert merged["phases"]["absent"]["status"] == "not available"
    printed = capsys.readouterr().out
    assert "lacking: not available: no such library" in printed
    assert "MISSED" in printed


def test_a_phase_that_fails_does_not_stop_the_others(tmp_path: Path, fakes: Any) -> None:
    code, merged = run(tmp_path, fakes("bad", "crash", "stray", "good"))
    assert code == 1
    assert merged["status"] == "failed"
    results = merged["phases"]
    assert {name: result["status"] for name, result in results.items()} == {
        "bad": "failed",
        "crash": "failed",
        "stray": "failed",
        "good": "ok",
    }
    assert [item["status"] for item in results["bad"]["items"]] == ["failed", "ok"]
    assert results["bad"]["items"][0]["reason"] == "ValueError: seven is not six"
    assert "seven is not six" in "\n".join(results["bad"]["log"])  # with its traceback
    assert "SIGABRT" in results["crash"]["error"]
    assert [item["name"] for item in results["crash"]["items"]] == ["works"]  # found before the crash
    assert "outside of any item" in results["stray"]["error"]


def test_a_phase_is_stopped_in_time_with_its_children(tmp_path: Path, fakes: Any) -> None:
    started = time.monotonic()
    code, merged = run(tmp_path, fakes("hang", "good"), "--minutes", "0.15")
    assert time.monotonic() - started < 30
    assert code == 1
    hang = merged["phases"]["hang"]
    assert hang["status"] == "timed out"
    assert 4 < hang["seconds"] < 8
    status = Path(f"/proc/{hang['items'][0]['values']['pid']}/status")
    assert not status.exists() or "zombie" in status.read_text()
    assert merged["phases"]["good"]["status"] == "ok"


def test_no_time_left(tmp_path: Path, fakes: Any) -> None:
    code, merged = run(tmp_path, fakes("good"), "--minutes", "0.01")
    assert code == 1
    assert merged["phases"]["good"]["status"] == "timed out"


def test_a_second_start_runs_only_what_did_not_go_well(tmp_path: Path, fakes: Any) -> None:
    found = fakes("environment", "bad", "good")
    run(tmp_path, found)
    assert runs(tmp_path) == ["environment", "bad", "good"]
    code, merged = run(tmp_path, found, "--resume")
    assert runs(tmp_path)[3:] == ["bad"]
    assert code == 1
    assert set(merged["phases"]) == {"environment", "bad", "good"}


def test_other_sources_are_measured_again(tmp_path: Path, fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, fakes("good"))
    monkeypatch.setattr(suite, "sources_hash", lambda: "others")
    _, merged = run(tmp_path, fakes("good"), "--resume")
    assert runs(tmp_path) == ["good", "good"]
    assert merged["sources"] == "others"


def test_half_a_result_is_not_taken_for_one(tmp_path: Path, fakes: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "good.json").write_text('{"schema": 1, "status": "o')
    code, _ = run(tmp_path, fakes("good"), "--resume")
    assert code == 0
    assert runs(tmp_path) == ["good"]


def test_one_phase_of_several(tmp_path: Path, fakes: Any) -> None:
    run(tmp_path, fakes("environment", "good"), "--phase", "good")
    assert runs(tmp_path) == ["good"]
    _, merged = run(tmp_path, fakes("environment", "good"), "--resume", "--phase", "environment")
    assert set(merged["phases"]) == {"environment", "good"}


def test_usage(
    tmp_path: Path, fakes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, fakes("good"))
    assert gpu_suite.main(["--output", str(tmp_path / "out"), "--device", "cpu"], fakes("good")) == 2
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(gpu_suite, "_has_gpu", lambda: False)
    assert gpu_suite.main(["--output", str(tmp_path / "new")], fakes("good")) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    assert gpu_suite.main(["--output", str(tmp_path / "new"), "--minutes", "0"], fakes("good")) == 2
    assert not (tmp_path / "new").exists()


def test_phases_are_there() -> None:
    for phase in gpu_suite.PHASES:
        module, _, function = phase.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def collect(function: Any, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Items of a real phase on the CPU, in this process."""
    report = Report(tmp_path / "phase.json", {})
    function(report, Context("cpu", tmp_path))
    report.finish()
    content = json.loads((tmp_path / "phase.json").read_text())
    assert content["status"] != "failed", content["error"]
    return {item["name"]: item for item in content["items"]}


def test_environment(tmp_path: Path) -> None:
    items = collect(phases.environment, tmp_path)
    assert items["machine"]["values"]["versions"]["torch"]
    assert items["gpu"]["status"] == "not available"
    assert items["backend torch"]["status"] == "ok"


@pytest.mark.parametrize("name", SPECS)
def test_correctness_of_the_references(name: str) -> None:
    results = phases.check_kernel(name, "cpu")
    assert len(results) == 3 * len(SPECS[name].dtypes)
    assert all(not result["problems"] for result in results)


def test_step_without_a_gpu(tmp_path: Path) -> None:
    items = collect(step.step, tmp_path)
    (row,) = items["torch engine"]["values"]["rows"]
    assert row["unit"] == "ms"
    assert row["p50"] > 0
    assert items["torch engine, CUDA graph"]["status"] == "not available"
    assert items["share of the probe head"]["status"] == "not available"


def test_engines_compute_the_step_of_diffusers(tmp_path: Path) -> None:
    made = step.make_models(Context("cpu", tmp_path))
    expected = made.diffusers(made.controlnet, made.unet)
    inputs = {**made.inputs, "residual_scale": made.inputs["residual_scale"].fill_(1)}
    assert (step.engine_step(*made.engines, inputs) - expected).abs().max() < 1e-5


def test_what_needs_a_gpu_says_so(tmp_path: Path) -> None:
    for function in (models.graphs, phases.gpu_tests, phases.compiled_kernels, step.compiled, step.exported):
        items = collect(function, tmp_path)
        assert {item["status"] for item in items.values()} == {"not available"}
        assert all(item["reason"] for item in items.values())


def test_backends_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotAvailable, match="onnxruntime on cuda"):
        models.need("onnxruntime", "cuda")
