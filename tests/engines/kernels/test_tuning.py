"""Launch configurations: complete tables, the right row, and the truth about what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from engines.kernels import SPECS, tuning

CAPABILITIES = ("80", "86", "89", "90", "120", "default")
FILES = {path.stem: path for path in Path(tuning.__file__).with_name("tuning").glob("*.json")}


def test_every_operator_has_a_file() -> None:
    assert FILES.keys() == SPECS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_tables_are_complete(name: str) -> None:
    kernel = importlib.import_module(f"engines.kernels.{name}.kernel").KERNEL
    tables = json.loads(FILES[name].read_text(encoding="utf-8"))["tables"]
    assert tuple(tables) == CAPABILITIES
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for table in tables.values():
        assert table["measured"] is False  # nobody has run these kernels on a GPU yet
        for row in table["rows"]:
            assert row["constants"].keys() <= constexprs
            assert all(value & (value - 1) == 0 for value in (*row["constants"].values(), row["num_warps"]))
        last = table["rows"][-1]
        assert (last["size"], last["element_bytes"]) == (None, 4)  # so that every problem finds a row


def test_the_first_row_that_admits_the_problem_is_taken() -> None:
    small = tuning.choose("dual_projection", 90, 256, 2)
    large = tuning.choose("dual_projection", 90, 4096, 2)
    single = tuning.choose("dual_projection", 90, 256, 4)
    assert small.constants["BLOCK_N"] < large.constants["BLOCK_N"]
    assert single.constants != small.constants
    assert tuning.choose("residual_mix", 90, 32, 2).split > tuning.choose("residual_mix", 90, 10**6, 2).split


def test_a_gpu_without_a_table_takes_the_default() -> None:
    assert tuning.choose("dual_projection", 75, 256, 2) == tuning.choose("dual_projection", None, 256, 2)
    assert tuning.capability(torch.ones(1)) is None


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'nothing'; there are for: dual_projection"):
        tuning.choose("nothing", 90, 1, 2)
