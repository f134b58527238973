from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from icexport.errors import UnsupportedOptionError, UsageError
from icexport.models.taps import TapKind, Taps

KINDS = get_args(TapKind)


def make_unet(up: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 32, 64)[3 - len(up) :],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")[3 - len(up) :],
        up_block_types=up,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        mid_block_type=None,
    ).eval()


@pytest.fixture(scope="module")
def shared_unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def unet(shared_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return shared_unet


def inputs(batch: int = 2, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + height)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    return sample, torch.tensor(300), torch.randn(batch, 7, 32, generator=generator)


def hooks_on(unet: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


class WithTaps(nn.Module):
    """A small UNet with taps of both kinds, recorded in one run."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = make_unet(("UpBlock2D", "CrossAttnUpBlock2D"))
        self.attn, self.conv = Taps(self.unet, "attn"), Taps(self.unet, "conv")

    def forward(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, ...]:
        with self.attn.record() as attn, self.conv.record() as conv:
            (prediction,) = self.unet(sample, timestep, prompt_embeds, return_dict=False)
        return (prediction, *attn, *conv)


def dynamic_shapes() -> tuple[dict[int, object], ...]:
    batch, height, width = torch.export.Dim("batch", max=16), torch.export.Dim("h"), torch.export.Dim("w")
    return {0: batch, 2: 2 * height, 3: 2 * width}, {}, {0: batch}


@pytest.mark.parametrize(
    ("kind", "dims", "scales"),
    [
        ("attn", (32, 32, 32, 32), (2, 2, 1, 1)),
        ("conv", (64, 64, 32, 32, 32, 32), (4, 4, 2, 2, 1, 1)),
    ],
)
@torch.no_grad()
def test_dims_and_scales_are_those_of_a_run(
    unet: UNet2DConditionModel, kind: TapKind, dims: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    taps = Taps(unet, kind)
    assert taps.dims == dims
    assert taps.scales == scales
    with taps.record() as recorded:
        unet(*inputs(height=8, width=12))
    assert [tap.shape for tap in recorded] == [
        (2, dim, 8 // scale, 12 // scale) for dim, scale in zip(dims, scales, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_sd15_layout(kind: TapKind) -> None:
    with torch.device("meta"):
        taps = Taps(UNet2DConditionModel(cross_attention_dim=768), kind)
    assert sum(taps.dims) == {"attn": 6720, "conv": 10560}[kind]
    assert taps.scales[-9:] == (4, 4, 4, 2, 2, 2, 1, 1, 1)


@torch.no_grad()
def test_attention_taps_are_the_tokens_in_place(unet: UNet2DConditionModel) -> None:
    taps = Taps(unet, "attn")
    tokens: list[Tensor] = []
    handles = [
        unet.get_submodule(name).register_forward_hook(lambda _m, _a, output: tokens.append(output))
        for name in taps.names
    ]
    with taps.record() as recorded:
        unet(*inputs(height=8, width=12))
    for handle in handles:
        handle.remove()
    for tap, expected in zip(recorded, tokens, strict=True):
        width = tap.shape[3]
        for row, column in ((0, 0), (0, width - 1), (tap.shape[2] - 1, 1)):
            torch.testing.assert_close(tap[:, :, row, column], expected[:, row * width + column], rtol=0, atol=0)


def test_taps_carry_gradients(unet: UNet2DConditionModel) -> None:
    sample, timestep, prompt_embeds = inputs()
    sample.requires_grad_()
    with Taps(unet, "attn").record() as recorded:
        unet(sample, timestep, prompt_embeds)
    (gradient,) = torch.autograd.grad(recorded[0].sum(), sample)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_second_forward_replaces_the_first(unet: UNet2DConditionModel) -> None:
    taps = Taps(unet, "conv")
    with taps.record() as once:
        unet(*inputs())
    with taps.record() as twice:
        unet(*inputs(height=16))
        unet(*inputs())
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hooks_are_gone_afterwards(unet: UNet2DConditionModel, kind: TapKind) -> None:
    taps = Taps(unet, kind)
    with taps.record():
        assert hooks_on(unet) > 0
        unet(*inputs())
    assert hooks_on(unet) == 0
    sample, timestep, _ = inputs()
    with pytest.raises(RuntimeError), taps.record():
        unet(sample, timestep, torch.zeros(2, 7, 5))
    assert hooks_on(unet) == 0


def test_no_forward_is_an_error(unet: UNet2DConditionModel) -> None:
    with pytest.raises(UsageError, match="Recorded 0 of 4 taps"), Taps(unet).record():
        pass


def test_gradient_checkpointing_is_refused() -> None:
    unet = make_unet()
    taps = Taps(unet)
    unet.enable_gradient_checkpointing()
    with pytest.raises(UnsupportedOptionError, match="disable_gradient_checkpointing"), taps.record():
        pass
    assert hooks_on(unet) == 0


def test_unet_without_attention_has_no_attention_taps() -> None:
    unet = make_unet(("UpBlock2D",) * 3)
    with pytest.raises(UsageError, match="no taps of kind 'attn'"):
        Taps(unet, "attn")
    assert len(Taps(unet, "conv").dims) == 6


def test_unknown_kind(unet: UNet2DConditionModel) -> None:
    with pytest.raises(UsageError, match="'attn' or 'conv'"):
        Taps(unet, "resnet")  # type: ignore[arg-type]


@torch.no_grad()
def test_torch_export_with_dynamic_shapes() -> None:
    model = WithTaps().eval()
    exported = torch.export.export(model, inputs(), dynamic_shapes=dynamic_shapes())
    other = inputs(3, 12, 20)
    for got, expected in zip(exported.module()(*other), model(*other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert hooks_on(model) == 0


@pytest.mark.slow
@torch.no_grad()
def test_onnx_export_with_dynamic_shapes(tmp_path: Path) -> None:
    model = WithTaps().eval()
    program = torch.onnx.export(model, inputs(), dynamic_shapes=dynamic_shapes(), dynamo=True, opset_version=21)
    assert program is not None
    program.save(tmp_path / "unet.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "unet.onnx", providers=["CPUExecutionProvider"])
    other = inputs(3, 12, 20)
    feed = {spec.name: tensor.numpy() for spec, tensor in zip(session.get_inputs(), other, strict=True)}
    for got, expected in zip(session.run(None, feed), model(*other), strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4)
