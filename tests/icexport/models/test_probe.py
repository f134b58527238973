from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from icexport.errors import CheckpointError, UsageError
from icexport.models.align import from_official, to_official
from icexport.models.probe import InnerControlProbe, ProbeConfig

TIME = 24
ATTN = (64, 64, 48, 48)
CONV = (80, 64, 64, 48)


class NormedConv(nn.Conv2d):
    def __init__(self, channels: int, out_channels: int, kernel: int, groups: int) -> None:
        super().__init__(channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


class OfficialBottleneck(nn.Module):
    """One layer of the official network, in the official order: everything at the output size."""

    def __init__(self, dim: int, projection: int, groups: int) -> None:
        super().__init__()
        width = projection // 4
        self.conv1 = NormedConv(dim, width, 1, groups)
        self.conv2 = NormedConv(width, width, 3, groups)
        self.conv3 = NormedConv(width, projection, 1, groups)
        self.emb_layers = nn.Linear(TIME, width)
        self.shortcut = NormedConv(dim, projection, 1, groups) if dim != projection else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        y = F.relu(self.conv1(x))
        if embedding is not None:
            y = y + F.relu(self.emb_layers(embedding))[:, :, None, None]
        y = F.relu(self.conv2(y))
        return F.relu(self.conv3(y) + self.shortcut(x))


class OfficialNetwork(nn.Module):
    """The official AggregationNetwork, written from its description, with its names."""

    def __init__(self, dims: tuple[int, ...], projection: int, groups: int, sequential: bool) -> None:
        super().__init__()
        self.dims, self.sequential = dims, sequential
        layers = [OfficialBottleneck(dim, projection, groups) for dim in dims]
        self.bottleneck_layers = nn.ModuleList(nn.Sequential(layer) if sequential else layer for layer in layers)
        self.mixing_weights = nn.Parameter(torch.ones(len(dims)))
        self.output_head = nn.Sequential(
            nn.Conv2d(projection, 128, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(128, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 3, 1),
            nn.Tanh(),
        )

    def forward(self, taps: list[Tensor], embedding: Tensor, size: tuple[int, int]) -> Tensor:
        resized = [F.interpolate(tap, size, mode="bilinear", align_corners=False) for tap in taps]
        maps = torch.split(torch.cat(resized, 1), list(self.dims), 1)
        weights = F.softmax(self.mixing_weights, 0)
        total = torch.zeros(())
        for index, layer in enumerate(self.bottleneck_layers):
            output = layer(maps[index]) if self.sequential else layer(maps[index], embedding)
            total = total + weights[index] * output
        return self.output_head(total)  # type: ignore[no-any-return]


def official(dims: tuple[int, ...], sequential: bool = False) -> OfficialNetwork:
    torch.manual_seed(1)
    network = OfficialNetwork(dims, projection=64, groups=8, sequential=sequential).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # so that no norm is an identity and no mixing weight a plain mean
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def config_for(dims: tuple[int, ...], sequential: bool = False, **changes: Any) -> ProbeConfig:
    times = {"time_embed_dim": None, "unused_time_embed_dim": TIME} if sequential else {"time_embed_dim": TIME}
    return ProbeConfig(**{"dims": dims, "projection_dim": 64, "num_groups": 8, **times, **changes})


def features(dims: tuple[int, ...], height: int = 12, width: int = 20, batch: int = 2) -> tuple[list[Tensor], Tensor]:
    """Two taps at each of as many levels as needed; the last at height x width."""
    generator = torch.Generator().manual_seed(height)
    scales = [2 ** ((len(dims) - 1 - index) // 2) for index in range(len(dims))]
    taps = [
        torch.randn(batch, dim, height // scale, width // scale, generator=generator)
        for dim, scale in zip(dims, scales, strict=True)
    ]
    return taps, torch.randn(batch, TIME, generator=generator)


def small_probe(**changes: Any) -> InnerControlProbe:
    torch.manual_seed(2)
    return InnerControlProbe(config_for((48, 32), projection_dim=32, head_dims=(8, 8), **changes)).eval()


@pytest.mark.parametrize("dims", [ATTN, CONV], ids=["attn", "conv"])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@torch.no_grad()
def test_equals_the_official_network(dims: tuple[int, ...], sequential: bool, size: tuple[int, int]) -> None:
    network = official(dims, sequential)  # both dims hold 64 = projection_dim: an identity shortcut
    probe = from_official(network.state_dict(), config_for(dims, sequential))
    taps, embedding = features(dims, *size)
    expected = network(taps, embedding, size)
    assert expected.std() > 0.05
    torch.testing.assert_close(probe(taps, embedding), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_output_scale_resizes_every_tap() -> None:
    network = official(ATTN)
    probe = from_official(network.state_dict(), config_for(ATTN, output_scale=2))
    taps, embedding = features(ATTN)
    torch.testing.assert_close(probe(taps, embedding), network(taps, embedding, (24, 40)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_official_state_comes_back_whole(sequential: bool) -> None:
    state = official(ATTN, sequential).state_dict()
    back = to_official(from_official(state, config_for(ATTN, sequential)))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


@torch.no_grad()
def test_time_embedding_matters_unless_the_official_file_drops_it() -> None:
    taps, embedding = features(ATTN)
    used = from_official(official(ATTN).state_dict(), config_for(ATTN))
    assert (used(taps, embedding) - used(taps, -embedding)).abs().max() > 1e-3
    dropped = from_official(official(ATTN, True).state_dict(), config_for(ATTN, True))
    torch.testing.assert_close(dropped(taps, embedding), dropped(taps), rtol=0, atol=0)
    assert not any(parameter.requires_grad for name, parameter in dropped.named_parameters() if ".time." in name)


def test_sd15_sizes() -> None:
    with torch.device("meta"):
        attn = InnerControlProbe(ProbeConfig(dims=(1280,) * 3 + (640,) * 3 + (320,) * 3))
        conv = InnerControlProbe(ProbeConfig(dims=(1280,) * 6 + (640,) * 3 + (320,) * 3, tap_kind="conv"))
    assert sum(parameter.numel() for parameter in attn.parameters()) == 5_907_436
    assert len(to_official(attn)) == 133
    assert sum(parameter.numel() for parameter in conv.parameters()) == 8_484_751


def test_initial_weights_have_the_fan_out_of_the_separate_layers() -> None:
    weight = InnerControlProbe(config_for((320,), projection_dim=256)).bottlenecks[0].get_parameter("project.weight")
    assert weight.shape == (64 + 256, 320, 1, 1)
    assert weight[:64].std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert weight[64:].std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@torch.no_grad()
def test_reading_is_bounded_only_with_tanh() -> None:
    probe = small_probe()
    taps, embedding = features(probe.config.dims)
    probe.output_head[-1].bias.fill_(5)  # type: ignore[operator]
    assert probe(taps, embedding).max() <= 1
    unbounded = InnerControlProbe(replace(probe.config, head_tanh=False))
    unbounded.load_state_dict(probe.state_dict())
    torch.testing.assert_close(unbounded(taps, embedding).tanh(), probe(taps, embedding))


def test_wrong_taps_and_missing_time_embedding() -> None:
    probe = small_probe()
    taps, embedding = features(probe.config.dims)
    with pytest.raises(UsageError, match=r"\(48, 32\) channels.*got \(48,\)"):
        probe(taps[:1], embedding)
    with pytest.raises(UsageError, match=r"\[batch, 24\], got None"):
        probe(taps)
    with pytest.raises(UsageError, match=r"got \(2, 23\)"):
        probe(taps, embedding[:, 1:])


def test_config_faults_are_listed_together() -> None:
    with pytest.raises(UsageError) as caught:
        ProbeConfig(dims=(), projection_dim=100, tap_kind="resnet", control_range=(1.0, -1.0))  # type: ignore[arg-type]
    for field in ("dims", "projection_dim", "tap_kind", "control_range"):
        assert f"\n  {field}: got" in str(caught.value)


@pytest.mark.parametrize("sequential", [False, True])
def test_saved_probe_comes_back(tmp_path: Path, sequential: bool) -> None:
    config = config_for(
        (48, 32), sequential, condition="hed", control_range=(-0.5, 0.5), provenance={"source": "align.pt"}
    )
    probe = InnerControlProbe(config)
    probe.save_pretrained(tmp_path / "probe")
    random_state = torch.get_rng_state()
    loaded = InnerControlProbe.from_pretrained(tmp_path, subfolder="probe")
    assert torch.equal(random_state, torch.get_rng_state())
    assert loaded.config == config
    for name, tensor in probe.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "probe/probe.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["condition"] == "hed"
    assert json.loads(metadata["control_range"]) == [-0.5, 0.5]
    assert json.loads(metadata["provenance"]) == {"source": "align.pt"}


def test_loaded_weights_outlive_their_file(tmp_path: Path) -> None:
    probe = small_probe()
    probe.save_pretrained(tmp_path)
    loaded = InnerControlProbe.from_pretrained(tmp_path)
    weights = tmp_path / "probe.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    torch.testing.assert_close(loaded.mixing_weights, probe.mixing_weights, rtol=0, atol=0)


def test_all_faults_of_the_weights_are_listed(tmp_path: Path) -> None:
    small_probe().save_pretrained(tmp_path)
    path = tmp_path / "probe.safetensors"
    state = load_file(path)
    state["extra"] = torch.zeros(1)
    del state["bottlenecks.0.norm1.bias"]
    state["mixing_weights"] = torch.ones(3)
    state["output_head.0.bias"][0] = torch.nan
    save_file(state, tmp_path / "new")
    (tmp_path / "new").replace(path)
    with pytest.raises(CheckpointError) as caught:
        InnerControlProbe.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert "extra: unexpected" in message
    assert "bottlenecks.0.norm1.bias: missing, expected [8]" in message
    assert "mixing_weights: shape [3], expected [2]" in message
    assert "output_head.0.bias: holds no values, NaN" in message


def truncate(folder: Path) -> None:
    path = folder / "probe.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / "probe.safetensors").unlink()


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_as_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def newer_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))


def other_class(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "ControlNetModel"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "probe.safetensors.*cut short"),
        (remove_weights, "probe.safetensors.*missing"),
        (garble_config, "config.json"),
        (list_as_config, "config.json.*JSON object"),
        (newer_config, "config.json.*colour"),
        (other_class, "config.json.*ControlNetModel"),
    ],
)
def test_damaged_folders_name_the_file(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    small_probe().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        InnerControlProbe.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nobody/icexport-no-such-probe", "not a name", "a/b/c"])
def test_names_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        InnerControlProbe.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


def test_official_faults_are_listed_together() -> None:
    state = official(ATTN).state_dict()
    del state["mixing_weights"]
    state["bottleneck_layers.1.conv2.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"(?s)conv2.weight: shape \[1\].*mixing_weights: missing"):
        from_official(state, config_for(ATTN))


def test_probe_without_time_layers_is_not_official() -> None:
    with pytest.raises(UsageError, match="no time layers"):
        to_official(InnerControlProbe(config_for(ATTN, time_embed_dim=None)))


class Positional(nn.Module):
    def __init__(self, probe: InnerControlProbe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, coarse: Tensor, fine: Tensor, time_embedding: Tensor) -> Tensor:
        return self.probe([coarse, fine], time_embedding)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("output_scale", "resizes"), [(1, 1), (2, 3)])
@torch.no_grad()
def test_onnx_export_with_independent_dynamic_sizes(tmp_path: Path, output_scale: int, resizes: int) -> None:
    probe = small_probe(output_scale=output_scale)  # its second tap has an identity shortcut: two maps to resize
    batch = torch.export.Dim("batch", max=16)
    dims = [{0: batch, 2: torch.export.Dim(f"h{i}"), 3: torch.export.Dim(f"w{i}")} for i in range(2)]
    # Equal sizes in the example, so that skipping a resize because of them would show.
    example = (torch.randn(2, 48, 8, 12), torch.randn(2, 32, 8, 12), torch.randn(2, TIME))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Positional(probe), example, dynamic_shapes=(*dims, {0: batch}), dynamo=True, opset_version=21
        )
    assert program is not None
    assert [node.op_type for node in program.model.graph].count("Resize") == resizes
    program.save(tmp_path / "probe.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "probe.onnx", providers=["CPUExecutionProvider"])
    for coarse, fine in (((4, 6), (8, 12)), ((5, 7), (15, 9)), ((6, 6), (6, 6))):
        other = (torch.randn(3, 48, *coarse), torch.randn(3, 32, *fine), torch.randn(3, TIME))
        feed = {spec.name: tensor.numpy() for spec, tensor in zip(session.get_inputs(), other, strict=True)}
        (got,) = session.run(None, feed)
        assert got.shape == (3, 3, fine[0] * output_scale, fine[1] * output_scale)
        np.testing.assert_allclose(got, probe(list(other[:2]), other[2]).numpy(), rtol=0, atol=1e-5)
