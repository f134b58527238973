"""What icexport cannot take is named for what it is. Most files here are made by the classes that save such files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    MotionAdapter,
    T2IAdapter,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from icexport.errors import UsageError
from icexport.models import kinds
from icexport.models.base_model import find_base
from icexport.models.source import ModelSource
from tests.icexport.models.originals import single_file, state_of
from tests.tiny_models import tiny_unet

State = dict[str, Tensor]


def state(module: nn.Module) -> State:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def named(**shapes: tuple[int, ...]) -> State:
    """Tensors of zeros; two underscores stand for a dot."""
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def lora() -> State:
    """As diffusers saves it."""
    layer = "unet__mid_block__attentions__0__to_q"
    return named(**{f"{layer}__lora_A__weight": (2, 16), f"{layer}__lora_B__weight": (16, 2)})


def controlnet(**changes: Any) -> ControlNetModel:
    sizes: dict[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D")
    embedding = (8, 8)
    options = {**sizes, "down_block_types": blocks, "conditioning_embedding_out_channels": embedding, **changes}
    return ControlNetModel(**options)


UNET = "model.diffusion_model.input_blocks.0.0.weight"
FILES: dict[str, tuple[Callable[[], State], str]] = {
    "lora of diffusers": (lora, "a LoRA.*fuse_lora"),
    "lora of kohya": (
        lambda: named(lora_unet_down_blocks_0__lora_down__weight=(2, 16), lora_te_text__alpha=()),
        "a LoRA",
    ),
    "lycoris": (lambda: named(unet_down__hada_w1_a=(2, 16)), "a LoRA"),
    "textual inversion": (lambda: named(emb_params=(2, 768)), "a textual inversion.*load_textual_inversion"),
    "textual inversion of diffusers": (lambda: {"<cat>": torch.zeros(768)}, "a textual inversion"),
    "t2i-adapter": (
        lambda: state(T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, adapter_type="full_adapter")),
        "a T2I-Adapter.*ControlNet",
    ),
    "t2i-adapter of its authors": (
        lambda: named(body__0__block1__weight=(8, 8, 3, 3), conv_in__weight=(8, 3, 3, 3)),
        "a T2I-Adapter",
    ),
    "ip-adapter": (
        lambda: named(image_proj__proj__weight=(8, 8), ip_adapter__1__to_k_ip__weight=(8, 8)),
        "IP-Adapter",
    ),
    "motion module": (
        lambda: state(MotionAdapter(block_out_channels=(32, 32), motion_layers_per_block=1, motion_norm_num_groups=8)),
        "motion module.*single pictures",
    ),
    "controlnet-union": (
        lambda: state(
            ControlNetUnionModel(
                block_out_channels=(32, 32),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                conditioning_embedding_out_channels=(8, 8),
                cross_attention_dim=32,
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16,
            )
        ),
        "a ControlNet-Union.*one condition",
    ),
    "controlnet-xs": (
        lambda: state(
            ControlNetXSAdapter.from_unet(
                tiny_unet(), size_ratio=1.0, conditioning_embedding_out_channels=(8, 16), num_attention_heads=2
            )
        ),
        "a ControlNet-XS",
    ),
    "controlnet of sdxl": (
        lambda: state(
            controlnet(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16,
                cross_attention_dim=32,
            )
        ),
        "a ControlNet of Stable Diffusion XL",
    ),
    "sdxl": (
        lambda: {UNET: torch.zeros(8, 4, 3, 3), **named(conditioner__embedders__1__model__ln_final__weight=(8,))},
        "Stable Diffusion XL. icexport builds Stable Diffusion 1 and 2",
    ),
    "refiner": (
        lambda: {UNET: torch.zeros(8, 4, 3, 3), **named(conditioner__embedders__0__model__ln_final__weight=(8,))},
        "the refiner of Stable Diffusion XL",
    ),
    "sd3": (lambda: named(model__diffusion_model__joint_blocks__0__mlp__weight=(8, 8)), "Stable Diffusion 3"),
    "flux": (lambda: named(double_blocks__0__img_attn__qkv__weight=(8, 8)), "FLUX"),
    "pixart": (lambda: named(adaln_single__linear__weight=(8, 8)), "PixArt"),
    "inpainting": (lambda: {UNET: torch.zeros(8, 9, 3, 3)}, r"an inpainting model \(9 input channels\)"),
    "inpainting unet": (
        lambda: state(UNet2DConditionModel.from_config(tiny_unet().config, in_channels=9)),
        "an inpainting model",
    ),
    "instruct-pix2pix": (lambda: {UNET: torch.zeros(8, 8, 3, 3)}, "an instruct-pix2pix model"),
    "something else": (
        lambda: named(layers__0__weight=(3, 3), layers__0__bias=(3,), head__weight=(3, 3)),
        "nothing that",
    ),
}


@pytest.mark.parametrize("role", ["model", "controlnet", "vae"])
@pytest.mark.parametrize("name", FILES)
def test_files(tiny_model: Path, tmp_path: Path, name: str, role: str) -> None:
    make, message = FILES[name]
    save_file(make(), tmp_path / "file.safetensors")

    with pytest.raises(UsageError, match=f"(?s)file.safetensors is no (base model|controlnet|vae): it is .*{message}"):
        ModelSource.find("canny", **{"model": str(tiny_model), role: str(tmp_path / "file.safetensors")})


def test_pickles(tiny_model: Path, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}, tmp_path / "cat.pt")
    torch.save({"aggregation_network": {"mixing_weights": torch.zeros(9)}, "step": 3}, tmp_path / "align.pt")

    with pytest.raises(UsageError, match="a textual inversion"):
        find_base(str(tmp_path / "cat.pt"))
    with pytest.raises(UsageError, match="an align model .* icexport convert .*align.pt --cond"):
        ModelSource.find("canny", str(tiny_model), probe=str(tmp_path / "align.pt"))
    with pytest.raises(UsageError, match="is no base model: it is an InnerControl align model"):
        find_base(str(tmp_path / "align.pt"))


PARTS = {
    "unet": ("is no base model: it is a UNet", "is no controlnet: it is a UNet", "is no vae: it is a UNet"),
    "vae": ("is no base model: it is an autoencoder", "is no controlnet: it is an autoencoder", None),
    "text_encoder": (
        "is no base model: it is a text encoder",
        "is no controlnet: it is a text encoder",
        "is no vae: it is a text encoder",
    ),
    "controlnet-canny": ("is no base model: it is a ControlNet", None, "is no vae: it is a ControlNet"),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_parts_in_the_wrong_place(tiny_model: Path, tmp_path: Path, part: str, whole: bool) -> None:
    """A component's file, or its folder, where another one belongs."""
    path = tiny_model / part
    if not whole:
        path = tmp_path / "part.safetensors"
        save_file(state_of(tiny_model / part), path)
    for role, message in zip(("model", "controlnet", "vae"), PARTS[part], strict=True):
        if message is not None:
            with pytest.raises(UsageError, match=message):
                ModelSource.find("canny", **{"model": str(tiny_model), role: str(path)})


PIPELINES = {
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
    "StableDiffusionXLControlNetPipeline": "Stable Diffusion XL",
    "StableDiffusionXLImg2ImgPipeline": "the refiner",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "FLUX",
    "PixArtSigmaPipeline": "PixArt",
    "StableDiffusionInstructPix2PixPipeline": "instruct-pix2pix",
    "StableDiffusionDepth2ImgPipeline": "depth-to-image",
    "AnimateDiffPipeline": "AnimateDiff",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_folders_of_other_pipelines(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))

    with pytest.raises(UsageError, match=f"is no base model: it is .*{PIPELINES[name]}"):
        find_base(str(tmp_path))


def test_other_folders(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "dit" / "transformer").mkdir(parents=True)
    with pytest.raises(UsageError, match="a model with a transformer. icexport builds"):
        find_base(str(tmp_path / "dit"))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "icexport.json").touch()
    with pytest.raises(UsageError, match="it is a bundle of icexport, which needs no build"):
        find_base(str(tmp_path / "bundle"))
    (tmp_path / "lora").mkdir()
    save_file(lora(), tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UsageError, match="is no base model: it is a LoRA"):
        find_base(str(tmp_path / "lora"))
    (tmp_path / "one").mkdir()
    save_file(single_file(tiny_model), tmp_path / "one" / "v1-5.safetensors")
    with pytest.raises(UsageError, match=r"a single-file model: give the file, .*v1-5\.safetensors"):
        find_base(str(tmp_path / "one"))
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    with pytest.raises(UsageError, match=r"is no vae: it is a tiny autoencoder \(TAESD\)"):
        find_base(str(tiny_model), vae=str(tmp_path / "taesd"))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"_class_name": "UNet2DModel"}, "is no unet: it is a UNet2DModel"),
        ("unet", {"_class_name": "UNetMotionModel"}, "is no unet: it is a model of AnimateDiff"),
        ("controlnet-canny", {"_class_name": "ControlNetUnionModel"}, "is no controlnet: it is a ControlNet-Union"),
        ("vae", {"_class_name": "ConsistencyDecoderVAE"}, "is no vae: it is a ConsistencyDecoderVAE"),
        ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}, "a CLIPTextModelWithProjection"),
        ("probe-canny", {"_class_name": "ControlNetModel"}, "is no probe: it is a ControlNet"),
    ],
)
def test_configs_of_another_class(
    tiny_model: Path, tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    with pytest.raises(UsageError, match=message):
        ModelSource.find("canny", str(model))


def test_an_index_of_another_class(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}))

    with pytest.raises(UsageError, match="gives vae as a AutoencoderTiny, which icexport does not build"):
        find_base(str(model))


def test_a_controlnet_of_another_base(tiny_model: Path, tmp_path: Path) -> None:
    save_file(state(controlnet(cross_attention_dim=32)), tmp_path / "control.safetensors")

    with pytest.raises(UsageError, match=r"of another base model: its text is 32 wide, and that of .* 16 \(768: "):
        ModelSource.find("canny", str(tiny_model), str(tmp_path / "control.safetensors"))


def test_every_kind_says_what_to_do() -> None:
    found = [kind for _, kind in (*kinds._TENSORS, *kinds._CLASSES)]
    assert all(kind.part or kind.way_out.endswith(".") for kind in found)
