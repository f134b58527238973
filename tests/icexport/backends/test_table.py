"""Choosing a backend: the choice is logged, a named one is never replaced, a broken one is never a crash."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from engines import errors
from engines.base import Availability
from icexport.backends import table

CPU_ONLY = Availability(True, "1.2", "no CUDA here", "Get CUDA", ("cpu",))
ABSENT = Availability(False, None, "not installed", "pip install it", ())
BOTH = Availability(True, "3.4", "", "", ("cpu", "cuda"))


def pretend(monkeypatch: pytest.MonkeyPatch, **availability: Availability) -> None:
    for name, backend in table.BACKENDS.items():
        found = availability.get(name, ABSENT)
        monkeypatch.setattr(backend, "check", lambda found=found: found)


def test_every_backend_answers_here() -> None:
    for backend in table.BACKENDS.values():
        found = backend.check()
        assert found.usable or (found.reason and found.fix)
    assert table.available()[-2:] == ("onnxruntime", "torch")


def test_unknown_names_list_the_known_ones() -> None:
    for ask in (table.get, table.resolve):
        with pytest.raises(ValueError, match=r"'openvino'.*tensorrt-rtx, onnxruntime, torch"):
            ask("openvino")


def test_a_module_that_cannot_be_imported_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "engines.availability", None)
    availability = table.get("onnxruntime").check()
    assert not availability.usable
    assert "engines.availability" in availability.reason
    assert table.available()[-1] == "torch"
    assert "onnxruntime" not in table.available()


def test_auto_logs_its_choice_and_what_it_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, onnxruntime=CPU_ONLY, torch=BOTH)
    with caplog.at_level(logging.INFO, "icexport"):
        assert table.resolve("auto", torch.device("cuda:1")) == "torch"
    for part in ("torch 3.4", "cuda", "not onnxruntime (no CUDA here"):
        assert part in caplog.text
    assert table.resolve("auto") == "onnxruntime"


def test_a_named_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime=ABSENT, torch=BOTH)
    assert table.resolve("torch", "cuda:0") == "torch"
    with pytest.raises(errors.BackendUnavailableError, match=r"onnxruntime.*not installed.*pip install it"):
        table.resolve("onnxruntime")


def test_auto_takes_only_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tensorrt=BOTH, onnxruntime=BOTH, torch=BOTH)
    assert table.resolve("auto", "cuda") == "tensorrt"
    assert table.resolve("auto", "cuda", ["onnxruntime", "torch"]) == "onnxruntime"


def test_building_for_another_machine_is_not_running(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Availability(False, "1.7", "no GPU", "Get one", (), cross_builds=True)
    assert builder.builds
    assert BOTH.builds
    assert not ABSENT.builds
    pretend(monkeypatch, **{"tensorrt-rtx": builder})
    with pytest.raises(errors.BackendUnavailableError, match="no GPU"):
        table.resolve("tensorrt-rtx", "cuda")


def test_auto_without_any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime=ABSENT, torch=CPU_ONLY)
    with pytest.raises(errors.BackendUnavailableError, match=r"'cuda'.*not installed.*no CUDA here"):
        table.resolve("auto", "cuda")


def test_the_table_is_read_without_torch() -> None:
    heavy = "{'torch', 'onnxruntime', 'numpy'} & set(sys.modules)"
    code = f"import icexport.backends.table, sys; sys.exit(' '.join({heavy}) or 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
