"""Where `ALL_TESTS` is set, as ``.ci/run`` does, a skip is a failure: nobody would notice it there.

A pytest plugin, which ``tests/conftest.py`` loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeVar

import pytest

ALL_TESTS = "ICEXPORT_ALL_TESTS"

ALLOWED_MARKERS = {"gpu": "needs a CUDA GPU, which CI does not have"}
ALLOWED_REASONS = {"needs a machine without CUDA": "CI may run on a machine with a GPU"}

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    report = yield
    return report if any(map(item.get_closest_marker, ALLOWED_MARKERS)) else checked(report)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[pytest.CollectReport]:
    return checked((yield))


def checked(report: Report) -> Report:
    """The report, which is a failure if it was a skip that is not allowed."""
    if os.environ.get(ALL_TESTS) and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in ALLOWED_REASONS:
            report.outcome = "failed"
            report.longrepr = f"With {ALL_TESTS} set, tests may not be skipped, but this one was: {reason}"
    return report
