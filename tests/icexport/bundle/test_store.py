from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from icexport.bundle.manifest import MANIFEST_NAME, Manifest
from icexport.bundle.records import ConditionInfo, SourceInfo
from icexport.bundle.store import Bundle, writing
from icexport.errors import BundleError, DamagedBundleError
from icexport.graphs.profile import Profile, SizeRange
from icexport.host.files import sha256
from tests.hashing import hash_files

ONE = SizeRange(1, 1, 1)


def fill(folder: Path, text: str) -> None:
    """A small but valid bundle."""
    for name in ("graphs/unet.onnx", "graphs/unet.onnx.data", "tokenizer/vocab.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} {text}")
    Manifest(
        key=text,
        condition=ConditionInfo("canny", (0.0, 1.0), "", "", "", True),
        source=SourceInfo("", "", None, None, {}),
        dtype="fp32",
        opset=21,
        profile=Profile(ONE, ONE, ONE),
        graphs={},
        configs={},
        engines={},
        files=hash_files(folder),
        tolerances={},
        parity={},
        versions={},
    ).write(folder)


def make(folder: Path, text: str = "old") -> Bundle:
    with writing(folder) as temporary:
        fill(temporary, text)
    return Bundle(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    """What lies beside the bundle, but for the lock, which stays."""
    return sorted(p.name for p in folder.parent.iterdir() if p != folder and p.suffix != ".lock")


def test_success_swaps(tmp_path: Path) -> None:
    output = tmp_path / "sub" / "canny"
    make(output, "old")
    make(output, "new")

    assert Bundle(output).manifest.key == "new"
    Bundle(output).verify()
    assert leftovers(output) == []
    assert output.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (RuntimeError("boom"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(1), SystemExit),
        (OSError(errno.ENOSPC, "No space left on device"), BundleError),
    ],
)
def test_a_failed_build_leaves_the_earlier_bundle(tmp_path: Path, error: BaseException, seen: type) -> None:
    output = tmp_path / "canny"
    make(output)
    before = contents(output)

    def fail_half_way() -> None:
        with writing(output) as temporary:
            fill(temporary, "new")
            raise error

    with pytest.raises(seen):
        fail_half_way()

    assert contents(output) == before
    assert leftovers(output) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No space left.* Nothing was changed"), writing(tmp_path / "canny"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "canny").exists()


def test_a_rename_that_fails_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "canny"
    make(output)
    before = contents(output)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BundleError, match="Input/output error"):
        make(output, "new")

    assert contents(output) == before
    assert leftovers(output) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "thesis"
    if kind == "file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / "chapter.txt").write_text("precious")

    with pytest.raises(BundleError, match="exists and is not a bundle"):
        make(output)

    assert (output if kind == "file" else output / "chapter.txt").read_text() == "precious"


def test_an_empty_folder_may_become_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "canny").mkdir()

    assert make(tmp_path / "canny").manifest.key == "old"


def test_a_link_keeps_pointing_to_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    make(tmp_path / "disk" / "canny")
    link = tmp_path / "canny"
    link.symlink_to(tmp_path / "disk" / "canny")

    make(link, "new")

    assert link.is_symlink()
    assert Bundle(tmp_path / "disk" / "canny").manifest.key == "new"
    assert leftovers(tmp_path / "disk" / "canny") == []


def test_two_builds_at_once(tmp_path: Path) -> None:
    output = tmp_path / "canny"
    inside, done = threading.Event(), threading.Event()

    def first() -> None:
        with writing(output) as temporary:
            fill(temporary, "first")
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    try:
        with pytest.raises(BundleError, match="Another build is writing"):
            make(output, "second")
    finally:
        done.set()
        thread.join()

    assert Bundle(output).manifest.key == "first"


def test_a_build_killed_between_the_renames(tmp_path: Path) -> None:
    output = tmp_path / "canny"
    make(output)
    before = contents(output)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from icexport.bundle import store\n"
        "rename = os.rename\n"
        "def killed(source, target):\n"
        "    if str(source).endswith('.tmp'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(source, target)\n"
        "os.rename = killed\n"
        "with store.writing(Path(sys.argv[1])): pass\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(output)], check=False, cwd=Path(__file__).parents[3])
    assert result.returncode == -signal.SIGKILL
    assert not output.exists()

    assert Bundle(output).manifest.key == "old"

    assert contents(output) == before
    make(output, "new")
    assert Bundle(output).manifest.key == "new"
    assert leftovers(output) == []  # also the temporary folder of the killed build


def test_opening_during_a_swap_does_not_restore(tmp_path: Path) -> None:
    output = tmp_path / "canny"
    make(output)
    with FileLock(tmp_path / ".canny.lock"):  # a living build ...
        output.rename(tmp_path / ".canny.old")  # ... between its two renames
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle(output)
        assert not output.exists()


def test_sweeping_spares_other_bundles(tmp_path: Path) -> None:
    others = [".canny.v2.abcdefgh.tmp", ".canny.v2.old", ".canny.notes.tmp", ".cannyx.abcdefgh.tmp"]
    for name in [*others, ".canny.abcdefgh.tmp"]:
        (tmp_path / name).mkdir()

    make(tmp_path / "canny")

    assert leftovers(tmp_path / "canny") == sorted(others)


def test_one_flipped_byte_is_found(tmp_path: Path) -> None:
    bundle = make(tmp_path / "canny")
    data = bundle.path / "graphs/unet.onnx.data"
    flipped = bytearray(data.read_bytes())
    flipped[3] ^= 1
    data.write_bytes(flipped)

    with pytest.raises(DamagedBundleError, match=r"graphs/unet\.onnx\.data was changed"):
        bundle.verify()
    with pytest.raises(DamagedBundleError, match=r"graphs/unet\.onnx\.data was changed"):
        bundle.file("graphs/unet.onnx.data")
    bundle.file("graphs/unet.onnx")


def test_every_problem_is_listed(tmp_path: Path) -> None:
    bundle = make(tmp_path / "canny")
    (bundle.path / "graphs/unet.onnx").unlink()
    (bundle.path / "tokenizer/vocab.json").write_text("{}")

    with pytest.raises(DamagedBundleError, match=r"unet\.onnx cannot be read \(No such file.*vocab\.json was changed"):
        bundle.verify()


def test_a_file_smuggled_into_a_folder_is_found(tmp_path: Path) -> None:
    bundle = make(tmp_path / "canny")
    assert bundle.folder("tokenizer") == bundle.path / "tokenizer"

    (bundle.path / "tokenizer/added_tokens.json").write_text("{}")

    with pytest.raises(DamagedBundleError, match=r"tokenizer/added_tokens\.json was added"):
        bundle.folder("tokenizer")


def test_unknown_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no graph 'vae_encoder'"):
        make(tmp_path / "canny").onnx("vae_encoder")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / MANIFEST_NAME).write_text("{}")

    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == expected
    assert hash_files(tmp_path) == {"a": expected}
