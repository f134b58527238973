from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from icexport.bench.latency import LatencyReport, run_latency
from icexport.bundle.manifest import MANIFEST_NAME
from icexport.errors import BundleError, CheckpointError, UsageError
from icexport.host.versions import machine
from tests.steps import Told


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, told: Told) -> LatencyReport:
    return run_latency(tiny_bundle, steps=2, warmup=0, iterations=2, batch=2, progress=told)


def test_every_provider_is_measured(report: LatencyReport) -> None:
    assert [p.name for p in report.providers] == ["diffusers", "onnxruntime", "torch"]
    for provider in report.providers:
        assert 0 < provider.best <= provider.median <= provider.p95
        assert provider.seconds_per_step is not None
        assert 0 < 2 * provider.seconds_per_step < 10 * provider.median
        assert provider.load_seconds > 0
        assert 0 <= provider.score <= 1


def test_its_steps(report: LatencyReport, told: Told) -> None:
    assert told.names == ["load diffusers", "load onnxruntime", "load torch", "measure", "time single steps"]
    assert told.expected == len(told.names)
    assert [part[1:] for part in told.parts if part[0] == "measure"] == [(done, 6) for done in range(6)]
    assert [part[1:] for part in told.parts if part[0] == "time single steps"] == [(done, 3) for done in range(3)]


def test_the_pictures_are_those_of_diffusers(report: LatencyReport) -> None:
    baseline, *others = report.providers

    assert baseline.psnr_db is None
    for provider in others:
        assert provider.psnr_db is not None
        assert provider.psnr_db >= 50
        assert provider.score == pytest.approx(baseline.score, abs=0.05)


def test_what_is_needed_to_repeat_it(report: LatencyReport, tiny_bundle: Path) -> None:
    assert (report.bundle, report.condition, report.dtype) == (str(tiny_bundle), "canny", "fp32")
    assert (report.height, report.width, report.batch, report.steps, report.iterations) == (16, 16, 2, 2, 2)
    assert report.scheduler == "UniPCMultistepScheduler"
    assert report.machine.keys() >= {"CPU", "cores", "threads", "torch", "diffusers", "onnxruntime"}


def test_json(report: LatencyReport) -> None:
    assert json.loads(report.to_json()) == json.loads(json.dumps(dataclasses.asdict(report)))


def test_markdown(report: LatencyReport) -> None:
    header, rule, *rows = report.to_markdown().split("\n\n")[0].splitlines()

    assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["diffusers", "onnxruntime", "torch"]
    assert "1.00x" in rows[0]
    assert "2 x 16 x 16 px, 2 steps of UniPCMultistepScheduler" in report.to_markdown()


def test_files(report: LatencyReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    paths = report.save(tmp_path / "new" / "v1.2")

    assert [path.name for path in paths] == ["v1.2.json", "v1.2.md", "v1.2.png"]
    assert paths[0].read_text() == report.to_json()
    assert paths[1].read_text() == report.to_markdown()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_missing_plot_library_names_the_extra(
    report: LatencyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(UsageError, match=r"pip install 'icexport\[report\]'"):
        report.plot(tmp_path / "x.png")


def test_one_backend_without_the_baseline(tiny_bundle: Path, tmp_path: Path) -> None:
    """The model need not be there."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    path = copy / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["source"]["model"] = "/nowhere/model"
    path.write_text(json.dumps(data))
    options = {"steps": 1, "warmup": 1, "iterations": 1}

    found = run_latency(copy, backends=["onnxruntime"], baseline=False, **options)

    (provider,) = found.providers
    assert provider.best == provider.median == provider.p95, "the warm-up must not count"
    assert (provider.name, provider.psnr_db, provider.seconds_per_step) == ("onnxruntime", None, None)
    assert "onnxruntime |" in found.to_markdown()
    with pytest.raises(CheckpointError, match="/nowhere/model"):
        run_latency(copy, **options)


def test_another_model_is_no_baseline(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    other = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (other / "vae" / "config.json").write_text((other / "vae" / "config.json").read_text() + "\n")
    path = copy / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["source"]["model"] = str(other)
    path.write_text(json.dumps(data))

    with pytest.raises(CheckpointError, match=r"is not the one .*vae/config\.json"):
        run_latency(copy, steps=1, iterations=1)


@pytest.mark.parametrize("options", [{"steps": 0}, {"iterations": 0}, {"warmup": -1}, {"batch": 0}])
def test_wrong_counts(tiny_bundle: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        run_latency(tiny_bundle, **options)


def test_what_the_bundle_does_not_have(tiny_bundle: Path, dynamic_bundle: Path) -> None:
    with pytest.raises(UsageError, match="batch 5: the bundle takes 1:1:4"):
        run_latency(tiny_bundle, batch=5)
    with pytest.raises(BundleError, match="not for torch"):
        run_latency(dynamic_bundle, backends=["torch"])


def test_the_commit_is_named_where_there_is_one() -> None:
    root = Path(__file__).parents[3]
    git = shutil.which("git")
    if not git or not (root / ".git").exists():
        assert "commit" not in machine()
        return
    known = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, check=False).returncode
    assert ("commit" in machine()) == (known == 0)
