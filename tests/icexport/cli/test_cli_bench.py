"""``icexport bench``: the table and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from icexport.cli import bench

SHORT = ("--backend", "onnxruntime", "--steps", "1", "--warmup", "0", "--iterations", "1", "--no-baseline")


def test_bench(icexport, tiny_bundle: Path, tmp_path: Path) -> None:
    run = icexport("bench", tiny_bundle, *SHORT, "--batch-size", "2", "--output", tmp_path / "new" / "v1.2", "--json")
    assert run.exit_code == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["steps"], report["warmup"], report["iterations"], report["batch"]) == (1, 0, 1, 2)
    assert [provider["name"] for provider in report["providers"]] == ["onnxruntime"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["v1.2.json", "v1.2.md", "v1.2.png"]
    assert json.loads((tmp_path / "new" / "v1.2.json").read_text()) == report


def test_a_missing_chart_library_is_told_before_the_work(icexport, monkeypatch, tiny_bundle, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda _name: None)
    run = icexport("bench", tiny_bundle, "--output", tmp_path / "x")
    assert run.exit_code == 2
    assert "icexport[report]" in run.stderr


def test_a_graph_that_is_not_possible_is_an_error(icexport, tiny_bundle: Path) -> None:
    run = icexport("bench", tiny_bundle, *SHORT, "--cuda-graph")
    assert run.exit_code == 2
    assert "onnxruntime on cpu cannot be captured" in run.stderr


@pytest.mark.parametrize("args", [("--iterations", "0"), ("--warmup", "-1"), ("--batch-size", "9")])
def test_wrong_counts(icexport, tiny_bundle: Path, args: tuple[str, str]) -> None:
    assert icexport("bench", tiny_bundle, *args).exit_code == 2
