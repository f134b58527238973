"""TensorRT-RTX builds plans of Stable Diffusion 1.5's true architecture within time and memory, with no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_size", *arguments], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_full_size_probe() -> None:
    found = run("--graph", "probe", "--target-sm", "89")
    assert found["targets"] == [89]
    assert found["plan_bytes"] > 2 * 5_907_436  # its weights in float16, and the code around them
    assert found["precision"]["fp16"] > found["precision"].get("fp32", 0)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["text_encoder", "controlnet", "unet", "vae_decoder"])
def test_full_size_plan(graph: str) -> None:
    found = run("--graph", graph, "--target-sm", "86", "89", "120")
    assert found["build_seconds"] <= 120
    assert found["peak_memory_bytes"] <= 8e9
