"""What a process may take, and gives back."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from icexport.host import memory

GAPS = """
import psutil
from icexport.host import memory

def resident(): return psutil.Process().memory_info().rss / 1e6

blocks = [bytearray(100_000) for _ in range(2000)]
for block in blocks: block[:] = b"x" * len(block)
del blocks[:-1]  # the last one keeps glibc from shrinking its heap
before = resident()
memory.release()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is given back is glibc's")
def test_what_was_freed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150, "megabytes"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    memory.release()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder of the control groups of a process that is in ``/pod/job`` of both versions."""
    (tmp_path / "cgroup").write_text("4:cpu:/other\n3:hugetlb,memory:/pod/job\n0::/pod/job\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def limit(group: Path, most: str, used: int, cached: int, names: tuple[str, str, str] = memory._V2) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / names[0]).write_text(f"{most}\n")
    (group / names[1]).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_a_machine_without_limits_has_what_is_free(groups: Path) -> None:
    limit(groups / "pod/job", "max", 10, 3)
    assert memory.available() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_the_tightest_container_counts(groups: Path) -> None:
    limit(groups / "pod/job", "1000000", 300_000, 100_000)
    assert memory.available() == 800_000, "its cache can go"
    limit(groups / "pod", "900000", 500_000, 0)
    assert memory.available() == 400_000
    limit(groups / "memory/pod", "500000", 400_000, 1, memory._V1)
    assert memory.available() == 100_001
    limit(groups, "500000", 600_000, 0)
    assert memory.available() == 0


@pytest.mark.parametrize("text", [None, "", "0::/nowhere\n"])
def test_no_control_groups(groups: Path, text: str | None) -> None:
    if text is None:
        memory._PROC.unlink()
    else:
        memory._PROC.write_text(text)
    assert memory.available() > 1_000_000
