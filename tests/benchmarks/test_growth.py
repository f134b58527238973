"""What the preflight expects, against what was measured at Stable Diffusion 1.5's size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.real_size.growth import Point, plot, points, table
from benchmarks.real_size.stages import growth_points

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "growth.json"


@pytest.fixture(scope="module")
def found() -> list[Point]:
    return points(json.loads(RESULTS.read_text()))


def test_sides_were_measured(found: list[Point]) -> None:
    sides = [(point.side, point.pictures) for point in found]
    assert {(side, 1) for side, pictures in growth_points("sd15") if pictures == 1} <= set(sides)


def test_the_preflight_is_within_15_percent_of_what_was_measured(found: list[Point]) -> None:
    for point in found:
        assert point.build_expected == pytest.approx(point.build_peak, rel=0.15), point
        assert point.expected == pytest.approx(point.peak, rel=0.15), point
        assert point.build_seconds_expected == pytest.approx(point.build_seconds, rel=0.15), point


def test_the_guide_has_the_measured_table(found: list[Point]) -> None:
    assert table(found) in (ROOT / "docs" / "guides" / "memory.md").read_text(encoding="utf-8")


def test_stages_that_did_not_end_well_are_left_out(found: list[Point], tmp_path: Path) -> None:
    document = json.loads(RESULTS.read_text())
    document["stages"]["generate-512x1"]["status"] = "killed"
    assert len(points(document)) == len(found) - 1
    plot(found, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
