from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from icexport.errors import UsageError
from icexport.optimum import command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What takes the place of optimum-onnx's own folder of command files."""
    (tmp_path / "register_export.py").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "of-another-package"), str(tmp_path)])
    monkeypatch.setattr(command, "find_spec", lambda _name: spec)
    return tmp_path


def test_register_writes_one_file_and_unregister_removes_it(folder: Path) -> None:
    path = command.register()
    assert path.parent == folder
    ast.parse(path.read_text())
    assert command.register() == path
    assert command.unregister() == path
    assert sorted(folder.iterdir()) == [folder / "register_export.py"]
    command.unregister()


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "register_icexport.py").mkdir()
    with pytest.raises(UsageError, match="Cannot write .*register_icexport"):
        command.register()
    with pytest.raises(UsageError, match="Cannot remove .*register_icexport"):
        command.unregister()


@pytest.mark.parametrize("missing", ["optimum", "optimum-onnx"])
def test_without_optimum_onnx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def find_spec(_name: str) -> None:
        if missing == "optimum":
            raise ModuleNotFoundError(missing)

    monkeypatch.setattr(command, "find_spec", find_spec)
    with pytest.raises(UsageError, match=r"pip install 'icexport\[optimum\]'"):
        command.register()
