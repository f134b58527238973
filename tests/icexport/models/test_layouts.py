"""Every layout in which people have their weights: found, counted, hashed, and loaded to the last value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline
from safetensors.torch import load_file
from torch import Tensor

import icexport
from icexport.bundle.store import Bundle
from icexport.errors import CheckpointError, UsageError
from icexport.models.fit import check_source
from icexport.models.hub import locate, wanted_files
from icexport.models.source import ModelSource
from icexport.models.weights import find_weights
from tests.icexport.models.layouts import F32, PARTS, assert_same, changed, save, shard, stem
from tests.icexport.models.originals import original_controlnet, original_vae, single_file, state_of
from tests.tiny_models import TEXT_LENGTH


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


LAYOUTS: dict[str, Callable[[Path, str, dict[str, Tensor]], list[str]]] = {}


def layout(name: str) -> Callable[[Callable[..., list[str]]], Callable[..., list[str]]]:
    def add(make: Callable[..., list[str]]) -> Callable[..., list[str]]:
        LAYOUTS[name] = make
        return make

    return add


@layout("bin")
def _bin(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    return [save(state, folder / f"{stem(part, 'bin')}.bin").name]


@layout("sharded")
def _sharded(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    return shard(folder, part, "safetensors", state)


@layout("sharded bin")
def _sharded_bin(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    return shard(folder, part, "bin", state)


@layout("only a variant")
def _only_variant(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    return [save(state, folder / f"{stem(part, 'safetensors')}.fp16.safetensors").name]


@layout("only a variant, sharded")
def _only_variant_sharded(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    return shard(folder, part, "safetensors", state, "fp16")


@layout("plain and a variant")
def _both(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    name = stem(part, "safetensors")
    save(changed(state), folder / f"{name}.fp16.safetensors")
    return [save(state, folder / f"{name}.safetensors").name]


@layout("safetensors and bin")
def _both_formats(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    _bin(folder, part, changed(state))
    return [save(state, folder / f"{stem(part, 'safetensors')}.safetensors").name]


@layout("two indices")
def _two_indices(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    shard(folder, part, "safetensors", changed(state), "fp16")
    return shard(folder, part, "safetensors", state)


@layout("an index and a single file")
def _index_and_file(folder: Path, part: str, state: dict[str, Tensor]) -> list[str]:
    single = folder / f"{stem(part, 'safetensors')}.safetensors"
    if part == "text_encoder":  # transformers takes the file, diffusers the index
        shard(folder, part, "safetensors", changed(state))
        return [save(state, single).name]
    save(changed(state), single)
    return shard(folder, part, "safetensors", state)


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders(model: Path, tiny_model: Path, name: str) -> None:
    files: dict[str, set[str]] = {}
    for part in PARTS:
        state = state_of(model / part)
        (path,) = (model / part).glob("*.safetensors")
        path.unlink()
        files[part.removesuffix("-canny")] = {"config.json", *LAYOUTS[name](model / part, part, state)}

    source = ModelSource.find("canny", str(model))

    assert_same(source, tiny_model)
    for part, names in files.items():
        assert {n.partition("/")[2] for n in source.files if n.startswith(f"{part}/")} >= names
        assert {n.partition("/")[2] for n in source.paths if n.startswith(f"{part}/")} == names


def test_the_variant_that_is_asked_for(model: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("unet", "controlnet-canny"):
        state, name = state_of(model / part), stem(part, "safetensors")
        save(state, model / part / f"{name}.fp16.safetensors")
        save(changed(state), model / part / f"{name}.safetensors")

    source = ModelSource.find("canny", str(model), variant="fp16")

    assert_same(source, tiny_model)
    assert source.parts["unet"].weights.variant == "fp16"
    assert "no weights of variant 'fp16' for vae and text_encoder" in caplog.text
    with pytest.raises(UsageError, match=r"--variant ema: .* no weights of this variant"):
        ModelSource.find("canny", str(model), variant="ema")


def test_several_variants_and_nothing_else(model: Path) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    shutil.copyfile(path, path.with_name("diffusion_pytorch_model.ema.safetensors"))
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))

    with pytest.raises(UsageError, match=r"unet has only the variants ema, fp16: choose one with --variant"):
        ModelSource.find("canny", str(model))
    assert ModelSource.find("canny", str(model), variant="ema").parts["unet"].weights.variant == "ema"


def test_a_file_of_another_name(model: Path, tiny_model: Path) -> None:
    """As trainers leave them: InnerControl's writes ``controlnet_state_dict.pt``."""
    save(state_of(model / "controlnet-canny"), model / "controlnet-canny" / "controlnet_state_dict.pt")
    (model / "controlnet-canny" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "my-vae.safetensors")

    assert_same(ModelSource.find("canny", str(model)), tiny_model)

    save({}, model / "vae" / "other.ckpt")
    with pytest.raises(UsageError, match=r"several files that could be its weights: my-vae\.safetensors, other\.ckpt"):
        ModelSource.find("canny", str(model))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pth"])
def test_a_single_file(model: Path, tiny_model: Path, tmp_path: Path, suffix: str) -> None:
    state = single_file(tiny_model)
    file = tmp_path / f"model.{suffix}"
    # Lightning's checkpoints have the tensors one level down, beside other things.
    wrapped: Any = {"state_dict": state, "global_step": 3} if suffix == "ckpt" else state
    save(wrapped, file)
    options = {"controlnet": str(model / "controlnet-canny"), "probe": str(model / "probe-canny")}

    source = ModelSource.find("canny", str(file), model_config=str(model), **options)

    assert_same(source, tiny_model)
    assert {f"{part}/{file.name}" for part in ("unet", "vae", "text_encoder")} < source.files.keys()
    with pytest.raises(UsageError, match=r"not of Stable Diffusion 1's size.*--model-config FOLDER_OR_HUB_ID"):
        ModelSource.find("canny", str(file), **options)


@pytest.mark.parametrize(("original", "prefix"), [(True, "control_model."), (True, ""), (False, "")])
def test_a_controlnet_in_a_single_file(tiny_model: Path, tmp_path: Path, original: bool, prefix: str) -> None:
    folder = tiny_model / "controlnet-canny"
    state = original_controlnet(folder) if original else state_of(folder)
    file = save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "control.safetensors")

    source = ModelSource.find("canny", str(tiny_model), str(file))

    assert_same(source, tiny_model)
    assert source.full_config("controlnet")["conditioning_embedding_out_channels"] == [8, 16]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_vae_of_another_place(tiny_model: Path, tmp_path: Path, original: bool, suffix: str) -> None:
    torch.manual_seed(5)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_model / "vae"))
    other.save_pretrained(tmp_path / "vae")
    state = original_vae(tmp_path / "vae") if original else state_of(tmp_path / "vae")
    file = save(state, tmp_path / f"vae.{suffix}")

    for place in (file, tmp_path / "vae"):
        source = ModelSource.find("canny", str(tiny_model), vae=str(place))
        found = source.vae(F32).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in other.state_dict().items())
        assert_same(source, tiny_model, ("unet", "text_encoder", "controlnet-canny"))


def test_a_cache_of_the_hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "hub" / "models--somebody--tiny"
    revisions = [root / "snapshots" / name for name in ("1111", "2222")]
    shutil.copytree(tiny_model, revisions[0])
    revisions[1].mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1111")

    assert locate(str(root)) == revisions[0]
    assert_same(ModelSource.find("canny", str(root)), tiny_model)
    (root / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match="without a main revision.*1111, 2222"):
        locate(str(root))
    revisions[1].rmdir()
    assert locate(str(root)) == revisions[0]


def test_what_is_fetched_from_the_hub() -> None:
    unet, text = "unet/diffusion_pytorch_model", "text_encoder/model"
    files = [
        *("model_index.json", "README.md", "v1-5-pruned.ckpt", "unet/config.json", "text_encoder/config.json"),
        *(f"{unet}{end}" for end in (".safetensors", ".fp16.safetensors", ".bin", ".non_ema.safetensors")),
        *(f"{text}.fp16.safetensors", "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors"),
        *(f"vae/diffusion_pytorch_model{end}" for end in (".safetensors.index.json", ".bin")),
        *(f"vae/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        *(f"vae/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)),
        *("tokenizer/vocab.json", "tokenizer/merges.txt"),
    ]
    parts = ("unet", "text_encoder", "vae", "tokenizer")
    common = {"model_index.json", "unet/config.json", "text_encoder/config.json", *files[-2:]}
    shards = {f"vae/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    shards.add("vae/diffusion_pytorch_model.safetensors.index.json")

    plain, half = (set(wanted_files(files, parts, variant)) for variant in (None, "fp16"))

    assert plain == common | shards | {f"{unet}.safetensors", "text_encoder/pytorch_model.bin"}
    assert half == common | shards | {f"{unet}.fp16.safetensors", f"{text}.fp16.safetensors"}


def test_optional_parts_may_be_missing(model: Path, tiny_model: Path) -> None:
    (model / "model_index.json").unlink()
    source = ModelSource.find("canny", str(model))

    assert_same(source, tiny_model)
    assert len(source.tokenizer()("a b").input_ids) == 4


def test_the_index_names_the_scheduler(model: Path, tmp_path: Path) -> None:
    """diffusers loads the class of ``model_index.json``, whatever the scheduler's own file says."""
    path = model / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    controlnet = ControlNetModel.from_pretrained(model / "controlnet-canny")
    theirs = StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=controlnet).scheduler
    assert type(theirs).__name__ == "DDIMScheduler"

    bundle = icexport.build("canny", model=str(model), backend="torch", verify=False, output=tmp_path / "bundle")

    ours = icexport.InnerControlPipeline.from_pretrained(bundle).scheduler
    assert type(ours) is type(theirs)
    theirs.set_timesteps(3)
    ours.set_timesteps(3)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert {n: v for n, v in theirs.config.items() if not n.startswith("_")}.items() <= ours.config.items()
    assert bundle.manifest.configs["scheduler"]["_class_name"] == "DDIMScheduler"


def test_a_text_encoder_whose_config_is_that_of_clip(model: Path, tiny_model: Path) -> None:
    path = model / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    own = {"model_type": "clip", "architectures": config.pop("architectures"), "projection_dim": 8}
    path.write_text(json.dumps(own | {"text_config": config}))

    source = ModelSource.find("canny", str(model))

    check_source(source)
    assert source.full_config("text_encoder")["max_position_embeddings"] == TEXT_LENGTH
    assert_same(source, tiny_model)


@pytest.mark.parametrize(("length", "said"), [(8, "8"), (None, "not said"), (1e30, r"1e\+30")])
def test_a_tokenizer_of_another_length(model: Path, length: float | None, said: str) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))

    with pytest.raises(UsageError, match=f"tokens of a prompt of tokenizer and text_encoder differ: {said}"):
        check_source(ModelSource.find("canny", str(model)))


def test_a_bundle_of_single_files(tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    files = {
        "model": save(single_file(tiny_model), tmp_path / "model.ckpt"),
        "controlnet": save(original_controlnet(tiny_model / "controlnet-canny"), tmp_path / "control.pth"),
        "vae": save(original_vae(tiny_model / "vae"), tmp_path / "vae.safetensors"),
    }
    options = {name: str(path) for name, path in files.items()}

    bundle = icexport.build(
        "canny",
        probe=str(tiny_model / "probe-canny"),
        model_config=str(tiny_model),
        backend="onnxruntime",
        output=tmp_path / "bundle",
        **options,
    )

    weights = [f"graphs/{name}.onnx.data" for name in ("unet", "controlnet", "vae_decoder")]
    theirs = Bundle(tiny_bundle).manifest.files
    assert [bundle.manifest.files[name] for name in weights] == [theirs[name] for name in weights]
    given = {"probe": str(tiny_model / "probe-canny"), "variant": None, "model_config": str(tiny_model)}
    assert bundle.manifest.source.names == {**options, **given}
    command = bundle.manifest.rebuild_command(bundle.path, ["onnxruntime"])
    assert f"--vae {files['vae']} --model-config {tiny_model}" in command


def test_weights_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights: no .safetensors file"):
        find_weights(tmp_path, "diffusers")
    assert load_file(save({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors"))
