"""The adapter against the real bindings of several versions: no name, argument or type that one does not have."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.engines.tensorrt.bindings import ROOT, environment

pytestmark = pytest.mark.tensorrt
CLASSIC = ("10.9.0.34", "10.16.1.11", "11.4.0.106")
RTX = "rtx"
FORBIDDEN = {  # flow -> the error, and the versions that do not have what it uses
    "fp16_flag": ("AttributeError", ("11.4.0.106", RTX)),
    "old_context": ("AttributeError", ("11.4.0.106", RTX)),
    "plugin_layer": ("AttributeError", (RTX,)),
    "wrong_name": ("TypeError", (*CLASSIC, RTX)),
    "wrong_type": ("TypeError", (*CLASSIC, RTX)),
    "too_many": ("TypeError", (*CLASSIC, RTX)),
    "read_only": ("AttributeError", (*CLASSIC, RTX)),
}


@dataclass(frozen=True)
class Outcome:
    """Errors of the flows of one version."""

    version: str
    reported: str
    errors: dict[str, str | None]


@pytest.fixture(scope="module", params=[*CLASSIC, RTX])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    version, folder = request.param, tmp_path_factory.mktemp("flows")
    if version == RTX:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("tensorrt_rtx is not installed; run: pip install tensorrt-rtx-cu13")
        flavour, env = "tensorrt-rtx", {**os.environ, "PYTHONPATH": str(ROOT)}
    else:
        flavour, env = "tensorrt", environment(version, tmp_path_factory.mktemp("bindings"))
    command = [sys.executable, "-m", "tests.engines.tensorrt.flows", flavour, str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return Outcome(version, result["version"], result["flows"])


def test_the_bindings_are_those_of_the_version(outcome: Outcome) -> None:
    assert outcome.reported.startswith("1.") if outcome.version == RTX else outcome.reported == outcome.version


@pytest.mark.parametrize("flow", ["build_plan", "refused_model", "run_plan", "captured_run", "damaged_plan"])
def test_the_adapter_uses_only_what_the_version_has(outcome: Outcome, flow: str) -> None:
    assert outcome.errors[flow] is None


@pytest.mark.parametrize("flow", FORBIDDEN)
def test_what_a_version_does_not_have_fails(outcome: Outcome, flow: str) -> None:
    kind, lacking = FORBIDDEN[flow]
    error = outcome.errors[flow]
    if outcome.version in lacking:
        assert error is not None
        assert error.startswith(kind)
    else:
        assert error is None
