"""The comparison of rewritten graphs with plain ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import rewrites


def test_each_rewritten_graph_is_timed_and_compared(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rewrites", str(tiny_bundle), "--rounds", "2"])
    rewrites.main()

    *lines, document = capsys.readouterr().out.splitlines()
    rows = json.loads(document)["rows"]
    assert {"controlnet", "unet", "vae_decoder"} <= {row["graph"] for row in rows}
    assert len(lines) == len(rows)
    for row in rows:
        assert row["difference"] < 1e-5, row
        assert row["gain"] == pytest.approx(row["plain ms"] / row["rewritten ms"], rel=0.02)
