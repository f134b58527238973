"""Which mutants are found; `make mutants` runs this first, in its own environment."""

from __future__ import annotations

from tests.mutation.mutants import find

SOURCE = '''
"""A docstring with 1 + 1."""
from typing import TYPE_CHECKING, Literal
if TYPE_CHECKING:
    A = 1
Kind = Literal["x", "y"]
def f(a: int | None = 3, flag: bool = True) -> list[int]:
    """Another."""
    logger.info("got %s", a + 1)
    problems.append(f"{a + 1} is wrong")
    if a < 2:
        raise ValueError(f"{a + 1}")
    return a + 1
'''


def lines(source: str) -> set[int]:
    return {mutant.line for mutant in find(source)}


def test_only_what_can_matter_is_changed() -> None:
    assert lines(SOURCE) == {7, 11, 13}


def test_each_mutant_is_one_change() -> None:
    found = [mutant.code() for mutant in find("x = a < 2 and not b\n")]
    assert "x = a <= 2 and not b\n" in found
    assert "x = a < 2 or not b\n" in found
    assert "x = a < 2 and b\n" in found
    assert "x = a < 3 and not b\n" in found
    assert "x = None\n" in found


def test_what_is_not_python_is_no_mutant() -> None:
    found = [mutant.code() for mutant in find("for a in b:\n    pass\nelse:\n    x = [a, *b]\nf(*a, **b)\n")]
    assert None not in found
