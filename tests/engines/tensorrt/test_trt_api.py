"""Which TensorRT is there, what it can do here, and what a plan is tied to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.errors import BackendUnavailableError
from engines.tensorrt import api

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module that is imported in place of a library."""

    def make(module: str, code: str) -> None:
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield make
    for name in ("tensorrt", "tensorrt_rtx"):
        if str(tmp_path) in str(getattr(sys.modules.get(name), "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see GPUs of the given compute capabilities."""

    def see(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {index(device)}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[index(device)])

    def index(device: Any) -> int:
        return device if isinstance(device, int) else torch.device("cuda" if device is None else device).index or 0

    return see


def test_importing_the_build_side_imports_neither_torch_nor_tensorrt() -> None:
    code = "import sys, engines.tensorrt.api, engines.tensorrt.worker; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert not {"torch", "tensorrt", "tensorrt_rtx"} & set(found.stdout.split())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10: cannot open"),
        ("raise OSError('libcudart.so.13: file too short')", "libcudart.so.13: file too short"),
        ("import not_there_at_all", "No module named 'not_there_at_all'"),
        ("", "has no attribute '__version__'"),
        ("__version__ = '10.8.0.43'", "tensorrt 10.8.0.43 is too old, 10.9 is needed"),
    ],
)
def test_a_library_that_does_not_work_is_named_with_the_fix(fake: Any, code: str, reason: str) -> None:
    fake("tensorrt", code)

    found = api.check("tensorrt")

    assert reason in found.reason
    assert "pip install" in found.fix
    assert "'tensorrt>=10.9'" in found.fix
    assert (found.usable, found.builds, found.devices) == (False, False, ())
    assert found.version == ("10.8.0.43" if "__version__" in code else None)
    with pytest.raises(BackendUnavailableError, match=reason) as error:
        api.load("tensorrt")
    assert found.fix in str(error.value)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)

    found = api.check("tensorrt-rtx")

    assert found.reason == "tensorrt_rtx is not installed"
    assert found.fix == "Run: pip install 'tensorrt-rtx-cu13>=1.7'"
    assert not found.builds


def test_new_versions_are_not_too_old(fake: Any) -> None:
    fake("tensorrt", "__version__ = '10.16.1.11'")
    assert api.load("tensorrt").__version__ == "10.16.1.11"


def test_without_a_gpu_rtx_still_builds_and_the_classic_library_does_not(
    fake: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("tensorrt", "__version__ = '11.4.0.106'")
    fake("tensorrt_rtx", "__version__ = '1.7.1.116'")
    gpu()
    monkeypatch.setattr(api, "driver_problem", lambda: "there is no NVIDIA driver (libcuda.so.1)")

    classic, rtx = api.check("tensorrt"), api.check("tensorrt-rtx")

    assert (classic.usable, classic.builds, classic.version) == (False, False, "11.4.0.106")
    assert (rtx.usable, rtx.builds, rtx.version) == (False, True, "1.7.1.116")
    for found in (classic, rtx):
        assert found.devices == ()
        assert found.reason == "there is no NVIDIA driver (libcuda.so.1)"
        assert "driver" in found.fix


@pytest.mark.parametrize(("cuda", "reason"), [(None, "was built without CUDA"), ("13.0", "sees no CUDA device")])
def test_a_driver_alone_is_not_enough(
    fake: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    fake("tensorrt_rtx", "__version__ = '1.7.1.116'")
    gpu()
    monkeypatch.setattr(api, "driver_problem", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    found = api.check("tensorrt-rtx")

    assert reason in found.reason
    assert found.fix


@pytest.mark.parametrize(
    ("capability", "classic", "rtx"),
    [
        ((6, 1), False, False),
        ((7, 5), True, True),
        ((8, 9), True, True),
        ((9, 0), True, False),
        ((10, 0), True, False),
    ],
)
def test_which_gpus_each_flavour_takes(
    fake: Any, gpu: Any, capability: tuple[int, int], classic: bool, rtx: bool
) -> None:
    fake("tensorrt", "__version__ = '10.9'")
    fake("tensorrt_rtx", "__version__ = '1.7'")
    gpu(capability)

    for found, expected in ((api.check("tensorrt"), classic), (api.check("tensorrt-rtx"), rtx)):
        assert found.usable == expected
        assert found.devices == (("cuda",) if expected else ())
        assert bool(found.reason) != expected
        assert bool(found.fix) != expected


def test_a_gpu_that_rtx_refuses_is_named_with_the_way_out(fake: Any, gpu: Any) -> None:
    fake("tensorrt_rtx", "__version__ = '1.7.1'")
    gpu((9, 0))

    found = api.check("tensorrt-rtx")

    assert "sm_86, sm_89, sm_120" in found.reason
    assert "GPU 0 (sm_90)" in found.reason
    assert "'tensorrt'" in found.fix
    assert found.builds, "for other GPUs it can still build"


def test_one_gpu_of_several_is_enough(fake: Any, gpu: Any) -> None:
    fake("tensorrt_rtx", "__version__ = '1.7.1'")
    gpu((9, 0), (8, 9))
    assert api.check("tensorrt-rtx").usable


@pytest.mark.parametrize(
    ("targets", "tag"), [((), "portable"), ((89,), "sm_89"), ((120, 86, 89, 86), "sm_86+sm_89+sm_120")]
)
def test_an_rtx_plan_is_tied_to_its_targets(targets: tuple[int, ...], tag: str) -> None:
    assert api.device_tag("tensorrt-rtx", targets, None) == tag


def test_a_classic_plan_is_tied_to_its_gpu(gpu: Any) -> None:
    gpu((9, 0), (12, 0))
    assert api.device_tag("tensorrt", (), None) == "GPU 0 sm_90"
    assert api.device_tag("tensorrt", (), "cuda:1") == "GPU 1 sm_120"
    assert api.device_tag("tensorrt", (), torch.device("cuda", 1)) == "GPU 1 sm_120"
    for device in ("cuda:2", "cpu"):
        with pytest.raises(BackendUnavailableError, match=f"{device} is not one of the 2 CUDA devices"):
            api.device_tag("tensorrt", (), device)


def test_without_a_gpu_there_is_no_classic_plan(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    monkeypatch.setattr(api, "driver_problem", lambda: "there is no NVIDIA driver")
    with pytest.raises(BackendUnavailableError, match="there is no NVIDIA driver.*tensorrt-rtx"):
        api.device_tag("tensorrt", (), "cuda")


def test_both_libraries_answer() -> None:
    for name, flavour in api.FLAVOURS.items():
        assert flavour.name == name
        assert isinstance(api.check(name).usable, bool)


@pytest.mark.tensorrt
def test_the_targets_are_those_of_the_installed_library() -> None:
    module = api.load("tensorrt-rtx")
    known = [int(member) for member in module.ComputeCapability.__members__.values()]
    assert tuple(sorted(capability for capability in known if capability > 1)) == api.RTX_TARGETS


@pytest.mark.tensorrt
def test_the_logger_passes_on_what_the_library_says() -> None:
    module = api.load("tensorrt-rtx")
    said: list[tuple[str, str]] = []
    logger = api.logger(module, lambda severity, text: said.append((severity, text)))

    module.Builder(logger).create_builder_config().builder_optimization_level = -1

    assert [text for severity, text in said if severity == "ERROR" and "level >= 0" in text]
