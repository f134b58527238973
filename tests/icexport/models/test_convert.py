"""Align models become probes, or say why not; nothing in them is run."""

from __future__ import annotations

import collections
import hashlib
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from icexport.errors import CheckpointError, UsageError
from icexport.models.align import to_official
from icexport.models.convert import convert
from icexport.models.probe import InnerControlProbe
from tests.icexport.models.converting import (
    SD15_ATTN,
    SMALL,
    TIME,
    RunsCode,
    convert_payload,
    leftovers,
    official_state,
    payload,
)


def test_official_sd15_file(tmp_path: Path) -> None:
    state = official_state(SD15_ATTN, 384, 1280)
    assert len(state) == 133
    assert sum(tensor.numel() for tensor in state.values()) == 5_907_436
    config = {
        "projection_dim": 384,
        "dims": SD15_ATTN,
        "save_timestep": [0],
        "num_timesteps": 1000,
        "aggregation_kwargs": {"use_output_head": True, "output_head_channels": 3, "bottleneck_sequential": False},
    }
    torch.save({"config": config, "aggregation_network": state}, tmp_path / "checkpoint_step_5000.pt")
    report = convert(tmp_path / "checkpoint_step_5000.pt", tmp_path / "out" / "probe", cond="depth", taps="attn")
    assert (report.kind, report.tensors, report.values) == ("probe", 133, 5_907_436)
    probe = InnerControlProbe.from_pretrained(tmp_path / "out" / "probe")
    assert probe.config.dims == tuple(SD15_ATTN)
    assert (probe.config.condition, probe.config.normaliser, probe.config.tap_kind) == ("depth", "max", "attn")
    assert (probe.config.time_embed_dim, probe.config.timestep_convention) == (1280, "true")
    digest = hashlib.sha256((tmp_path / "checkpoint_step_5000.pt").read_bytes()).hexdigest()
    assert probe.config.provenance == {
        "source": "checkpoint_step_5000.pt",
        "source_sha256": digest,
        "backbone": "SD 1.5",
    }
    assert report.source_sha256 == digest
    back = to_official(probe)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_missing_control_range_is_assumed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = payload()
    del content["config"]["dataset_args"]
    with caplog.at_level(logging.WARNING, "icexport"):
        report = convert_payload(tmp_path, content)
    assert report.config["control_range"] == (-1.0, 1.0)
    assert len(report.warnings) == 1
    assert "no control_range: assumed (-1, 1)" in report.warnings[0]
    assert report.warnings[0] in caplog.text


@pytest.mark.parametrize("kind", [torch.nn.Parameter, Tensor.half])
def test_parameters_and_halves_become_plain_float32(tmp_path: Path, kind: Callable[[Tensor], Tensor]) -> None:
    content = payload()
    state = {name: kind(tensor) for name, tensor in content["aggregation_network"].items()}
    convert_payload(tmp_path, {**content, "aggregation_network": state})
    back = to_official(InnerControlProbe.from_pretrained(tmp_path / "probe"))
    assert all(torch.equal(back[name], tensor.detach().float()) for name, tensor in state.items())


def test_control_range_recorded_or_asked(tmp_path: Path) -> None:
    content = payload()
    content["config"]["dataset_args"]["control_range"] = [-0.5, 0.5]
    report = convert_payload(tmp_path, content)
    assert (report.config["control_range"], report.warnings) == ((-0.5, 0.5), ())
    report = convert_payload(tmp_path, content, control_range=(-1.0, 1.0), force=True)
    assert report.config["control_range"] == (-1.0, 1.0)
    assert "records control_range [-0.5, 0.5]" in report.warnings[0]


def test_sequential_is_read_from_the_names(tmp_path: Path) -> None:
    content = payload(sequential=True)
    del content["config"]["aggregation_kwargs"]["bottleneck_sequential"]
    report = convert_payload(tmp_path, content)
    assert report.config["time_embed_dim"] is None
    assert report.config["unused_time_embed_dim"] == TIME
    assert report.config["timestep_convention"] == "none"
    back = to_official(InnerControlProbe.from_pretrained(tmp_path / "probe"))
    assert back.keys() == content["aggregation_network"].keys()


@pytest.mark.parametrize("sequential", [False, True])
def test_sequential_against_the_config(tmp_path: Path, sequential: bool) -> None:
    content = payload(sequential)
    content["config"]["aggregation_kwargs"]["bottleneck_sequential"] = not sequential
    with pytest.raises(
        CheckpointError, match=f"config says {not sequential}, the names of the weights say {sequential}"
    ):
        convert_payload(tmp_path, content)


@pytest.mark.parametrize(
    ("dims", "model_id", "asked", "expected"),
    [
        ([1280] * 6 + [640] * 3 + [320] * 3, None, None, ("conv", "SD 1.5")),
        ([1280] * 3 + [640] * 3, None, None, ("attn", "SDXL")),
        (SD15_ATTN, "runwayml/stable-diffusion-v1-5", None, ("attn", "SD 1.5")),
        (SD15_ATTN, "stabilityai/stable-diffusion-xl-base-1.0", None, ("conv", "SDXL")),
        (SD15_ATTN, "somebody/else", "conv", ("conv", "SDXL")),
        (SMALL, None, "conv", ("conv", "unknown")),
    ],
)
def test_kind_of_taps(
    tmp_path: Path, dims: list[int], model_id: str | None, asked: str | None, expected: tuple[str, str]
) -> None:
    content = payload()
    content["config"].update(dims=dims, model_id=model_id)
    content["aggregation_network"] = official_state(dims, 64, TIME)
    report = convert_payload(tmp_path, content, taps=asked)
    assert (report.config["tap_kind"], report.config["provenance"]["backbone"]) == expected


@pytest.mark.parametrize(
    ("dims", "asked", "message"),
    [
        (SD15_ATTN, None, "6720: attn taps of SD 1.5 or conv taps of SDXL. Give the kind"),
        (SMALL, None, "128: no UNet known here. Give the kind"),
        ([1280] * 3 + [640] * 3, "conv", "5760 are attn taps"),
    ],
)
def test_kind_of_taps_that_must_be_given(tmp_path: Path, dims: list[int], asked: str | None, message: str) -> None:
    content = payload()
    content["config"]["dims"] = dims
    content["aggregation_network"] = official_state(dims, 64, TIME)
    with pytest.raises(UsageError, match=message):
        convert_payload(tmp_path, content, taps=asked)


def test_all_faults_are_listed_together(tmp_path: Path) -> None:
    content = payload()
    state = content["aggregation_network"]
    state["bottleneck_layers.1.conv2.weight"] = torch.zeros(16, 16, 1, 1)
    state["bottleneck_layers.0.conv3.norm.bias"][3] = torch.nan
    state["output_head.2.bias"] = torch.zeros(32, dtype=torch.int64)
    state["output_head.0.bias"] = "text"
    state["bottleneck_layers.0.emb_layers.bias"] = torch.zeros(16).to_sparse()
    state["bottleneck_layers.1.emb_layers.bias"] = torch.zeros(16, device="meta")
    state["bottleneck_layers.2.emb_layers.bias"] = torch.zeros(16).to(torch.float8_e4m3fn)
    state["logit_scale"] = torch.zeros(())
    del state["mixing_weights"]
    content["config"]["save_timestep"] = [0, 1]
    with pytest.raises(CheckpointError) as caught:
        convert_payload(tmp_path, content)
    message = str(caught.value)
    assert "align.pt" in message
    assert "bottleneck_layers.1.conv2.weight: shape [16, 16, 1, 1], expected [16, 16, 3, 3]" in message
    assert "bottleneck_layers.0.conv3.norm.bias: holds no values, NaN" in message
    assert "output_head.2.bias: not a dense tensor" in message
    assert "output_head.0.bias: not a dense tensor" in message
    assert "bottleneck_layers.0.emb_layers.bias: not a dense tensor" in message
    assert "bottleneck_layers.1.emb_layers.bias: holds no values" in message
    assert "bottleneck_layers.2.emb_layers.bias: not a dense tensor" in message
    assert "logit_scale: unexpected" in message
    assert "mixing_weights: missing, expected [3]" in message
    assert "save_timestep: got [0, 1]" in message
    assert leftovers(tmp_path) == ["align.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": []}, "dims: got"),
        ({"dims": [48, -1, 32]}, "dims: got"),
        ({"dims": "many"}, "dims: got 'many'"),
        ({"dims": None}, "dims: got None"),
        ({"dims": [48, 32]}, "dims: 2 taps, but the weights hold bottlenecks for 3"),
        ({"dims": [10**30, 48, 32]}, "dims: got"),
        ({"projection_dim": 66}, "projection_dim: got 66, expected a multiple of 4"),
        ({"projection_dim": None}, "projection_dim: got None"),
        ({"dataset_args": {"control_range": [1]}}, "control_range: got"),
        ({"dataset_args": {"control_range": 1}}, "control_range: got"),
    ],
)
def test_broken_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = payload()
    content["config"].update(change)
    with pytest.raises(CheckpointError, match=message):
        convert_payload(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"config": {}},
        {"config": {}, "aggregation_network": [1]},
        {"config": {}, "aggregation_network": {1: 2}},
    ],
)
def test_other_payloads(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"align.pt: Not an align model"):
        convert_payload(tmp_path, content)


def test_correspondence_head_is_named(tmp_path: Path) -> None:
    content = payload()
    for name in [name for name in content["aggregation_network"] if name.startswith("output_head")]:
        del content["aggregation_network"][name]
    with pytest.raises(CheckpointError, match="correspondence or appearance head"):
        convert_payload(tmp_path, content)


def test_pose_head_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pose-keypoint head"):
        convert_payload(tmp_path, payload(out_channels=18))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "marker"
    content = {**payload(), "extra": RunsCode(marker)}
    torch.save(content, tmp_path / "align.pt", _use_new_zipfile_serialization=zipped)
    torch.load(tmp_path / "align.pt", weights_only=False)  # the file is hostile indeed
    assert marker.exists()
    marker.unlink()
    with pytest.raises(CheckpointError, match=r"asks for [a-z.]*getattr, .*sandbox"):
        convert(tmp_path / "align.pt", tmp_path / "probe", cond="hed", taps="attn")
    assert leftovers(tmp_path) == ["align.pt"]


def test_refused_container_is_named(tmp_path: Path) -> None:
    content = payload()
    content["config"]["extra"] = collections.deque()
    with pytest.raises(CheckpointError, match=r"asks for collections.deque, "):
        convert_payload(tmp_path, content)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -1000, -10])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_named(tmp_path: Path, zipped: bool, kept: int) -> None:
    source = tmp_path / "align.pt"
    torch.save(payload(), source, _use_new_zipfile_serialization=zipped)
    source.write_bytes(source.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"align.pt is cut short, damaged"):
        convert(source, tmp_path / "probe", cond="hed", taps="attn")
    assert leftovers(tmp_path) == ["align.pt"]


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"<html></html>", pickle.dumps({}), b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "align.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"align\.pt"):
        convert(tmp_path / "align.pt", tmp_path / "probe", cond="hed", taps="attn")


def test_compressed_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icexport.models.checkpoint.MAX_PICKLE_BYTES", 1 << 20)
    source = tmp_path / "align.pt"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0", bytes(2 << 20))
    assert source.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="unpacks to 2097152 bytes"):
        convert(source, tmp_path / "probe", cond="hed")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("align.pt", {"cond": None}, "does not record its condition: give its name"),
        ("missing.pt", {}, "does not exist"),
        ("probe.safetensors", {}, "cannot be converted: it is nothing that icexport knows"),
        ("lora.safetensors", {}, "cannot be converted: it is a LoRA.*fuse_lora"),
    ],
)
def test_wrong_use(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    torch.save(payload(), tmp_path / "align.pt")
    save_file({f"layers.{i}": torch.zeros(1) for i in range(3)}, tmp_path / "probe.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / name, tmp_path / "probe", **{"cond": "hed", "taps": "attn", **options})


def test_output_is_replaced_only_when_asked_and_ours(tmp_path: Path) -> None:
    convert_payload(tmp_path, payload())
    with pytest.raises(UsageError, match="exists"):
        convert_payload(tmp_path, payload(), cond="depth")
    assert InnerControlProbe.from_pretrained(tmp_path / "probe").config.condition == "hed"
    convert_payload(tmp_path, payload(), cond="depth", force=True)
    assert InnerControlProbe.from_pretrained(tmp_path / "probe").config.condition == "depth"
    assert leftovers(tmp_path) == ["align.pt", "probe"]
    (tmp_path / "probe" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not replaced"):
        convert_payload(tmp_path, payload(), force=True)


def test_failed_replacement_keeps_the_old_output(tmp_path: Path) -> None:
    convert_payload(tmp_path, payload())
    content = payload()
    del content["aggregation_network"]["mixing_weights"]
    with pytest.raises(CheckpointError):
        convert_payload(tmp_path, content, cond="depth", force=True)
    assert InnerControlProbe.from_pretrained(tmp_path / "probe").config.condition == "hed"
