"""Phases of the GPU suite about the machine and the kernels."""

from __future__ import annotations

import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.gpu import measure
from benchmarks.gpu.machine import ROOT, checkout, driver_version, version_of
from benchmarks.gpu.report import Context, NotAvailable, Report
from benchmarks.gpu.timing import Bench, Row, ceilings
from engines.kernels import SPECS
from engines.kernels.check import check
from icexport.backends import table

_PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "numpy",
)  # fmt: skip
_DRY_CASES = 3
# Not tests/training, which needs packages that a GPU machine may lack.
_TESTS = ("tests/engines", "tests/icexport")


def environment(report: Report, context: Context) -> None:
    """Report GPU, driver, versions, commit, and which backends can be used."""
    with report.item("machine") as item:
        commit, dirty = checkout()
        item.values |= {
            "driver": driver_version(),
            "versions": {"python": platform.python_version(), **{name: version_of(name) for name in _PACKAGES}},
            "cuda": torch.version.cuda,
            "commit": commit,
            "dirty": dirty,
            "cpus": os.cpu_count(),
        }
    with report.item("gpu") as item:
        context.need_cuda()
        properties = torch.cuda.get_device_properties(context.device)
        item.values |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),  # older versions of torch do not say
        }
    for name in table.BACKENDS:
        with report.item(f"backend {name}") as item:
            state = table.get(name).check()
            item.values |= asdict(state)
            if not state.usable:
                raise NotAvailable(f"{state.reason}. {state.fix}")


def correctness(report: Report, context: Context) -> None:
    """Check every case of every kernel, in every dtype that it takes, against the reference in float64."""
    # A process for each operator: most of the time goes into compiling the kernels' variants.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(SPECS) if context.cuda else 1, mp_context=spawn) as pool:
        pending = {name: pool.submit(check_kernel, name, context.device) for name in SPECS}
        for name, future in pending.items():
            with report.item(name) as item:
                results = future.result()
                bad = [result for result in results if result["problems"]]
                item.values |= {"checked": len(results), "failed": bad, "rms_over_eager_rms": _worst(results)}
                if bad:
                    raise ValueError(f"{len(bad)} of {len(results)} cases: {bad[0]['case']} {bad[0]['problems']}")


def check_kernel(name: str, device: str) -> list[dict[str, Any]]:
    """Return results of ``engines.kernels.check``; on a CPU a few small cases, for which it compares references."""
    spec = SPECS[name]
    cases = spec.cases if device != "cpu" else spec.cases[:_DRY_CASES]
    return [asdict(check(spec, case, device, dtype)) for case in cases for dtype in spec.dtypes]


def _worst(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest RMS error by dtype, as a multiple of eager torch's, where that is finite and not 0."""
    found: dict[str, float] = {}
    for result in results:
        if 0 < result["eager_rms"] < float("inf"):
            ratio = result["rms"] / result["eager_rms"]
            found[result["dtype"]] = max(found.get(result["dtype"], 0.0), ratio)
    return found


class _Collector:
    """Keeps what pytest reports of each test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call of a test, and whatever goes wrong around it."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome].append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be imported: its tests did not run."""
        if report.outcome == "failed":
            self.outcomes["failed"].append(report.nodeid)


def gpu_tests(report: Report, context: Context) -> None:
    """Run ``pytest -m gpu`` over this repository."""
    with report.item("pytest -m gpu") as item:
        context.need_cuda()
        collector = _Collector()
        options = ["-m", "gpu and not network", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        code = pytest.main([*options, *(str(ROOT / folder) for folder in _TESTS)], plugins=[collector])
        passed = collector.outcomes.pop("passed")
        item.values |= {"passed": len(passed), **collector.outcomes}
        if code != pytest.ExitCode.OK:
            raise RuntimeError(f"pytest ended with {int(code)}; failed: {', '.join(collector.outcomes['failed'])}")


def kernels(report: Report, context: Context) -> None:
    """Time the whole head, then every kernel but for torch.compile: see ``benchmarks.kernels``."""
    bench = Bench(context.device)
    with torch.no_grad():
        limits = ceilings(bench)
        with report.item("ceilings") as item:
            item.values["rows"] = [asdict(row) for row in measure.ceiling_rows(bench, limits)]
        times: dict[str, float] = {}
        for provider, timed in measure.head_rows(bench):
            with report.item(f"probe_head, {provider}") as item:
                row = timed()
                times[provider] = row.p50
                item.values["rows"] = [asdict(row)]
        with report.item("goals of the head") as item:
            context.need_cuda()
            item.goals |= measure.head_goals(times)
        for spec, case in measure.kernel_cases(bench):
            for provider, call in measure.kernel_calls(spec, case, bench).items():
                with report.item(f"{spec.name} {case}, {provider}") as item:
                    rows: list[Row] = list(measure.kernel_rows(spec, case, provider, call, bench, limits))
                    item.values["rows"] = [asdict(row) for row in rows]


def compiled_kernels(report: Report, context: Context) -> None:
    """Time torch.compile on the kernels' references; a phase of its own, for the compiler takes most of it."""
    bench = Bench(context.device)
    with torch.no_grad():
        limits = ceilings(bench)
        for spec, case in measure.kernel_cases(bench):
            with report.item(f"{spec.name} {case}, torch.compile") as item:
                context.need_cuda()
                call = measure.compiled_call(spec, case, bench)
                rows = list(measure.kernel_rows(spec, case, "torch.compile", call, bench, limits))
                item.values["rows"] = [asdict(row) for row in rows]
