from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from icexport.errors import CheckpointError, UsageError
from icexport.models import loading
from icexport.models.source import ModelSource

F32 = torch.float32
LOADERS = {
    "unet": loading.load_unet,
    "vae": loading.load_vae,
    "text_encoder": loading.load_text_encoder,
    "controlnet-canny": loading.load_controlnet,
    "probe-canny": loading.load_probe,
}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda part: Path(shutil.copytree(tiny_model / part, tmp_path / part))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_finds_every_part(tiny_model: Path) -> None:
    source = ModelSource.find("canny", str(tiny_model))

    assert source.controlnet.folder == tiny_model / "controlnet-canny"
    assert source.probe is not None
    assert source.probe.folder == tiny_model / "probe-canny"
    assert {name.partition("/")[0] for name in source.files} == {
        "model_index.json",
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "controlnet",
        "probe",
    }
    assert source.elements() == {
        part.removesuffix("-canny"): sum(tensor.numel() for tensor in load_file(weights(tiny_model / part)).values())
        for part in LOADERS
    }


def test_parts_may_lie_elsewhere(tiny_model: Path, copy: Callable[[str], Path]) -> None:
    moved = copy("controlnet-canny")

    source = ModelSource.find("hed", str(tiny_model), str(moved), "none")

    assert source.controlnet.folder == moved
    assert source.probe is None
    assert source.probe_model(F32) is None
    assert not any(name.startswith("probe/") for name in source.files)


def test_what_is_missing_is_named_with_its_option(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No controlnet for 'hed': .*controlnet-hed\. Give --controlnet"):
        ModelSource.find("hed", str(tiny_model))
    with pytest.raises(UsageError, match=r"No probe for 'hed': .*Give --probe .*--probe none for a bundle without"):
        ModelSource.find("hed", str(tiny_model), str(tiny_model / "controlnet-canny"))
    with pytest.raises(UsageError, match=r"has no config\.json"):
        ModelSource.find("canny", str(tiny_model), str(tmp_path))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks unet/config\.json, vae/config\.json, "):
        ModelSource.find("canny", str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a file, nor a folder, nor a Hub id \(owner/name\)"):
        ModelSource.find("canny", name)


def test_configs_of_older_versions_get_defaults(tiny_model: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(tiny_model, tmp_path / "old"))
    gone = {
        "unet": ("time_cond_proj_dim", "addition_embed_type"),
        "vae": ("scaling_factor",),
        "controlnet-canny": ("global_pool_conditions", "conditioning_channels"),
        "text_encoder": ("layer_norm_eps",),
    }
    for part, names in gone.items():
        path = old / part / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))
    source, new = ModelSource.find("canny", str(old)), ModelSource.find("canny", str(tiny_model))

    for part, names in gone.items():
        part = part.partition("-")[0]
        assert {n: source.full_config(part)[n] for n in names} == {n: new.config(part)[n] for n in names}


def test_unreadable_configs(tiny_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    (broken / "vae" / "config.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"Cannot read .*vae/config\.json"):
        ModelSource.find("canny", str(broken))
    (broken / "unet" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        ModelSource.find("canny", str(broken))


@pytest.mark.parametrize("part", LOADERS)
def test_loads_in_the_asked_precision(tiny_model: Path, part: str) -> None:
    model = LOADERS[part](tiny_model / part, torch.float16)

    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float16, False)}


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_damaged_weights(copy: Callable[[str], Path], part: str, damage: str) -> None:
    folder = copy(part)
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"")

    with pytest.raises(CheckpointError, match=f"(?s){part}.*cut short"):
        LOADERS[part](folder, F32)


def test_damaged_weights_are_found_before_loading(tiny_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    for part in ("vae", "controlnet-canny"):
        path = weights(broken / part)
        path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=r"/vae/.*cut short.*controlnet-canny.*cut short"):
        ModelSource.find("canny", str(broken)).elements()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_every_tensor_that_does_not_fit_is_listed(copy: Callable[[str], Path], part: str, fault: str) -> None:
    folder = copy(part)
    state = load_file(weights(folder))
    first, second = [name for name in state if name.endswith(("fc1.weight", "conv1.weight"))][:2]
    if fault == "missing":
        del state[first], state[second]
    elif fault == "mismatched":
        state |= {name: torch.zeros(3, 3) for name in (first, second)}
    else:
        first, second = "alien.bias", "alien.weight"
        state |= {name: torch.zeros(3) for name in (first, second)}
    save_file(state, weights(folder), metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=f"do not fit .*{fault}: ") as caught:
        LOADERS[part](folder, F32)

    assert first.removeprefix("text_model.") in str(caught.value)
    assert second.removeprefix("text_model.") in str(caught.value)


def test_a_config_of_another_architecture(copy: Callable[[str], Path]) -> None:
    folder = copy("unet")
    configure(folder, block_out_channels=[32, 64])

    with pytest.raises(CheckpointError, match="do not fit UNet2DConditionModel") as caught:
        loading.load_unet(folder, F32)
    assert str(caught.value).count("conv1.weight") > 4

    configure(folder, block_out_channels=[16, 32], cross_attention_dim="wide")
    with pytest.raises(CheckpointError, match="another architecture than its config"):
        loading.load_unet(folder, F32)


@pytest.mark.parametrize("part", LOADERS)
def test_no_weights(copy: Callable[[str], Path], part: str) -> None:
    folder = copy(part)
    weights(folder).unlink()

    with pytest.raises(CheckpointError, match=r"has no weights|probe\.safetensors"):
        LOADERS[part](folder, F32)


def test_names_of_older_checkpoints(copy: Callable[[str], Path]) -> None:
    """Stable Diffusion 1.5 as published: nested CLIP names with stored positions, VAE attention by old names."""
    folder = copy("text_encoder")
    state = load_file(weights(folder))
    nested = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    nested["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(nested, weights(folder), metadata={"format": "pt"})
    loading.load_text_encoder(folder, F32)

    folder = copy("vae")
    state = load_file(weights(folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    save_file({rename(name): tensor for name, tensor in state.items()}, weights(folder), metadata={"format": "pt"})
    loading.load_vae(folder, F32)
