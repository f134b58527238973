from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engines.errors import BackendUnavailableError
from icexport.backends.base import PlanOptions
from icexport.backends.table import BACKENDS
from icexport.builder.options import BuildOptions, BuildSpec
from icexport.errors import CheckpointError, ConditionError, UsageError
from icexport.graphs.profile import SizeRange
from icexport.models.fit import check_source
from icexport.models.source import ModelSource


def spec(folder: Path, cond: str = "canny", backend: str | list[str] = "onnxruntime", **options: Any) -> BuildSpec:
    backends = [backend] if isinstance(backend, str) else backend
    return BuildSpec.of(cond, BuildOptions(**({"model": str(folder), "backends": backends} | options)))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_defaults_come_from_the_model(tiny_model: Path) -> None:
    found = spec(tiny_model)

    assert found.profile.height == found.profile.width == SizeRange(16, 16, 16)
    assert found.profile.batch == SizeRange(1, 1, 4)
    assert found.backends == ("onnxruntime",)


def test_backends_are_resolved_once(tiny_model: Path) -> None:
    assert spec(tiny_model, backend="auto").backends == ("onnxruntime",)
    assert spec(tiny_model, backend=["torch", "auto", "torch"]).backends == ("torch", "onnxruntime")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cond": "kanny"}, ConditionError, "no condition 'kanny'.*canny, hed, lineart, depth"),
        ({"backend": "onnx"}, UsageError, "--backend onnx: choose auto or tensorrt, .*onnxruntime, torch"),
        ({"plans": PlanOptions(targets=(86,))}, UsageError, "--target-sm is for --backend tensorrt-rtx"),
        (
            {"plans": PlanOptions(targets=(86, 90)), "backend": "tensorrt-rtx"},
            UsageError,
            "--target-sm 90: TensorRT-RTX builds for 75, .*121. .*Hopper",
        ),
        (
            {"plans": PlanOptions(optimization_level=6), "backend": "tensorrt-rtx"},
            UsageError,
            "--optimization-level 6: choose 0 to 5",
        ),
        ({"dtype": "bf16", "backend": "torch", "opset": 21}, UsageError, "--opset 21: bfloat16 .* need 22"),
        (
            {"dtype": "bf16", "backend": "tensorrt-rtx", "plans": PlanOptions(targets=(75, 86))},
            UsageError,
            "--target-sm 75: has no bfloat16",
        ),
        ({"dtype": "bf16"}, UsageError, "--dtype bf16: backend onnxruntime takes fp32 or fp16"),
        ({"backend": "tensorrt"}, BackendUnavailableError, "'tensorrt' cannot build here: .*pip install"),
        ({"shapes": ["16x16"], "height": 16}, UsageError, "leave --height and --width out"),
        ({"shapes": ["16x16", "16by32"]}, UsageError, "--shape 16by32: give HEIGHTxWIDTH"),
        ({"shapes": ["16x16", "16x18", "16x32"]}, UsageError, "--width 18: .*multiples of 4"),
        ({"dtype": "int8"}, UsageError, "--dtype int8: choose fp32 or fp16 or bf16"),
        ({"opset": 17}, UsageError, "--opset 17: choose one of 18, .*23"),
        ({"opset": 24}, UsageError, "--opset 24"),
        ({"height": "18"}, UsageError, "--height 18: .*multiples of 4 pixels. Nearest: 16 or 20"),
        ({"width": "16:16:33"}, UsageError, "--width 33"),
        ({"height": 0}, UsageError, "1 <= min"),
        ({"batch_size": "4:2:1"}, UsageError, "1 <= min <= opt <= max"),
        ({"batch_size": "many"}, UsageError, "Cannot read the size 'many'"),
        ({"model": "/nowhere"}, CheckpointError, "/nowhere is neither a file, nor a folder, nor a Hub id"),
        ({"controlnet": "/nowhere"}, CheckpointError, "/nowhere"),
    ],
)
def test_options_that_cannot_be_used(
    tiny_model: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spec(tiny_model, **options)


def test_a_model_without_a_size_of_its_own(copy: Path) -> None:
    configure(copy / "unet", sample_size=None)

    with pytest.raises(UsageError, match="does not say its size .*--height and --width"):
        spec(copy, height=16)
    assert spec(copy, height=16, width=24).profile.width == SizeRange(24, 24, 24)


def test_equal_builds_have_equal_keys(tiny_model: Path, copy: Path) -> None:
    assert spec(tiny_model).key() == spec(copy).key()
    assert spec(tiny_model, backend="auto").key() == spec(tiny_model).key()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16"},
        {"height": 32},
        {"width": "16:16:32"},
        {"batch_size": 1},
        {"opset": 22},
        {"backend": "torch"},
        {"probe": "none"},
        {"verify": False},
    ],
)
def test_every_option_changes_the_key(tiny_model: Path, options: dict[str, Any]) -> None:
    assert spec(tiny_model, **options).key() != spec(tiny_model).key()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet-canny", "probe-canny"])
def test_one_changed_weight_changes_the_key(tiny_model: Path, copy: Path, part: str) -> None:
    (path,) = (copy / part).glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert spec(copy).key() != spec(tiny_model).key()


def test_another_tokenizer_or_scheduler_changes_the_key(tiny_model: Path, copy: Path) -> None:
    configuration = copy / "scheduler" / "scheduler_config.json"
    configuration.write_text(configuration.read_text().replace("scaled_linear", "linear"))

    assert spec(copy).key() != spec(tiny_model).key()


def test_other_versions_change_the_key(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spec(tiny_model).key()
    monkeypatch.setattr("icexport.host.versions.metadata.version", lambda name: f"{name} 99")

    assert spec(tiny_model).key() != before


def test_parts_that_fit(tiny_model: Path) -> None:
    check_source(ModelSource.find("canny", str(tiny_model)))


def test_every_misfit_is_listed(copy: Path) -> None:
    configure(copy / "unet", in_channels=9, class_embed_type="timestep", time_cond_proj_dim=256)
    configure(copy / "controlnet-canny", cross_attention_dim=1024, layers_per_block=2, global_pool_conditions=True)
    configure(copy / "text_encoder", use_attention_mask=True)
    configure(copy / "probe-canny", dims=[8, 8], time_embed_dim=1280, condition="hed")

    with pytest.raises(UsageError, match="do not work together") as caught:
        check_source(ModelSource.find("canny", str(copy)))

    for problem in (
        "unet has class_embed_type = 'timestep'",
        "unet has time_cond_proj_dim = 256",
        "controlnet has global_pool_conditions = True",
        "text_encoder has use_attention_mask = True",
        "latent channels of unet and vae differ: 9 and 4",
        "text width of controlnet and text_encoder differ: 1024 and 16",
        "residuals that unet takes and controlnet gives differ: ",
        "condition of probe and ControlNet differ: hed and canny",
        "taps of probe and unet differ: (8, 8) and (32, 32, 16, 16)",
        "time embedding of probe and unet differ: 1280 and 64",
    ):
        assert problem in str(caught.value)


def test_a_unet_config_that_makes_no_sense(copy: Path) -> None:
    configure(copy / "unet", addition_embed_type="text_time")

    with pytest.raises(UsageError, match="addition_embed_type = 'text_time'.*describes no UNet"):
        check_source(ModelSource.find("canny", str(copy)))


def test_a_backend_that_cannot_build_here(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.base import Availability

    missing = Availability(False, None, "it is broken", "mend it", ())
    monkeypatch.setattr(type(BACKENDS["onnxruntime"]), "check", lambda _self: missing)

    with pytest.raises(BackendUnavailableError, match="it is broken. mend it"):
        spec(tiny_model, backend="onnxruntime")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 20}, UsageError, "--opset 20: plugins need 21 or later.*--no-plugins"),
        ({"height": "16:16:32"}, UsageError, "one height and one width.*--no-plugins"),
        ({"shapes": ["16x16", "16x32"]}, UsageError, "one height and one width"),
        ({"triton": None}, BackendUnavailableError, "Triton, which is not installed.*--no-plugins"),
    ],
)
def test_what_plugins_need_is_told_before_the_work(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    from engines.base import Availability

    present = Availability(True, "10.13", "", "", ("cuda",))
    monkeypatch.setattr(type(BACKENDS["tensorrt"]), "check", lambda _self: present)
    if "triton" in options:
        monkeypatch.setattr("icexport.backends.tensorrt.find_spec", lambda _name: None)
    options = {name: value for name, value in options.items() if name != "triton"}
    with pytest.raises(error, match=message):
        spec(tiny_model, backend="tensorrt", **options)
    assert spec(tiny_model, backend="tensorrt", plans=PlanOptions(plugins=False), **options).backends
    assert spec(tiny_model, backend="tensorrt", probe="none", **options).backends


def test_other_weights_of_one_architecture_change_the_key(tiny_model: Path, copy: Path) -> None:
    (path,) = (copy / "controlnet-canny").glob("*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)

    assert spec(tiny_model, controlnet=str(copy / "controlnet-canny")).key() != spec(tiny_model).key()
