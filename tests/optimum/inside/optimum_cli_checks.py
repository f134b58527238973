"""Checks that need the optimum extra: `tests/optimum/test_optimum_environment.py` runs them in its environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from optimum.commands import optimum_cli
from optimum.exporters import utils as optimum_parts
from optimum.onnxruntime import ORTDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from icexport.errors import CheckpointError, ExportError
from icexport.graphs.graph import Graph
from icexport.graphs.stable_diffusion import controlnet_graph, probe_graph, unet_graph
from icexport.models.source import ModelSource
from icexport.models.taps import Taps
from icexport.optimum import command
from icexport.optimum.export import controlled
from icexport.optimum.pipeline import ORTStableDiffusionControlNetPipeline
from icexport.runtime.eager import load_eager
from tests import tiny_models
from tests.tiny_models import TEXT_LENGTH, save_tiny_model

BIN = Path(sys.executable).parent
SCALES = (0.7, 1.3)  # residual scale of the first and of the other samples
TOLERANCE = 1e-5
IMPORTED = """
import sys
from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load
load()
print(*{"icexport", "torch"} & set(sys.modules))
"""


def command_line(model: Path, output: Path, kwargs: dict[str, str] | None, *options: str) -> list[str | Path]:
    """`optimum-cli export onnx` as a user types it; optimum's example prompt must fit the tiny text encoder."""
    words = [BIN / "optimum-cli", "export", "onnx", "--model", model, "--task", "text-to-image", *options]
    words += ["--sequence_length", str(TEXT_LENGTH), output]
    return words if kwargs is None else [*words, "--model-kwargs", json.dumps(kwargs)]


def export(model: Path, output: Path, kwargs: dict[str, str] | None, *options: str) -> Path:
    run = subprocess.run(command_line(model, output, kwargs, *options), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "values not close enough" not in run.stderr  # optimum's own check of each part
    return output


@pytest.fixture(scope="session", autouse=True)
def registered() -> Iterator[None]:
    """The extension switched on, by the command that users are told."""
    subprocess.run([sys.executable, "-m", "icexport.optimum", "register"], check=True)
    yield
    command.unregister()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved by this environment's transformers 4, whose tokenizer is made from files."""
    folder = tmp_path_factory.mktemp("model")

    def tokenizer(vocab: dict[str, int], merges: list[str], model_max_length: int) -> CLIPTokenizer:
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        return CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", model_max_length=model_max_length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "CLIPTokenizer", tokenizer)
        return save_tiny_model(folder / "tiny")


@pytest.fixture(scope="session")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("exported"), {"condition": "canny"})


@pytest.fixture(scope="session")
def source(model: Path) -> ModelSource:
    return ModelSource.find("canny", str(model))


def run_onnx(folder: Path, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip([output.name for output in session.get_outputs()], map(torch.from_numpy, found), strict=True))


def interface(folder: Path, name: str) -> list[list[tuple[str, str, list[int | str]]]]:
    session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
    return [[(t.name, t.type, t.shape) for t in tensors] for tensors in (session.get_inputs(), session.get_outputs())]


def described(graph: Graph) -> list[list[tuple[str, str, list[int | str]]]]:
    types = {torch.float32: "tensor(float)", torch.float16: "tensor(float16)"}
    return [[(s.name, types[s.dtype], list(s.shape)) for s in specs] for specs in (graph.inputs, graph.outputs)]


def graphs(source: ModelSource, dtype: torch.dtype) -> list[Graph]:
    unet, probe = source.unet(dtype), source.probe_model(dtype)
    assert probe is not None
    return [
        controlnet_graph(source.controlnet_model(dtype), TEXT_LENGTH, 2, dtype),
        unet_graph(unet, TEXT_LENGTH, probe.config, dtype),
        probe_graph(probe, unet, dtype),
    ]


def test_environment_is_the_pinned_one() -> None:
    pins = {"diffusers": "0.38.0", "optimum": "2.1.0", "optimum-onnx": "0.1.0", "transformers": "4.57.6"}
    assert {name: metadata.version(name) for name in pins} == pins


def test_interfaces_are_those_of_our_graphs(exported: Path, source: ModelSource) -> None:
    for graph in graphs(source, torch.float32):
        assert interface(exported, graph.name) == described(graph)


def test_optimums_own_parts_are_there(exported: Path) -> None:
    for part in ("text_encoder", "vae_encoder", "vae_decoder"):
        assert (exported / part / "model.onnx").is_file()
    assert (exported / "scheduler").is_dir()
    assert (exported / "tokenizer").is_dir()


@pytest.mark.parametrize("part", ["controlnet", "unet", "probe"])
def test_configs_are_the_models(exported: Path, model: Path, part: str) -> None:
    folder = model / (part if part == "unet" else f"{part}-canny")
    expected = json.loads((folder / "config.json").read_text())
    found = json.loads((exported / part / "config.json").read_text())
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 6, 10), (3, 14, 4)])
def test_numbers_are_diffusers(exported: Path, source: ModelSource, batch: int, height: int, width: int) -> None:
    unet, controlnet, probe = (
        source.unet(torch.float32),
        source.controlnet_model(torch.float32),
        source.probe_model(torch.float32),
    )
    assert probe is not None
    generator = torch.Generator().manual_seed(height)
    step = {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor(321.0),
        "prompt_embeds": torch.randn(batch, TEXT_LENGTH, 16, generator=generator),
    }
    control_map = torch.rand(batch, 3, 2 * height, 2 * width, generator=generator)
    strength = torch.tensor([SCALES[0], *[SCALES[1]] * (batch - 1)])
    with torch.no_grad():
        arguments = (step["sample"], step["timestep"], step["prompt_embeds"])
        down, middle = controlnet(*arguments, control_map, return_dict=False)
        down, middle = [r * strength.reshape(-1, 1, 1, 1) for r in down], middle * strength.reshape(-1, 1, 1, 1)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        with Taps(unet).record() as taps:
            noise = unet(*arguments, **added).sample
        embedding = unet.time_embedding(unet.time_proj(step["timestep"].reshape(1)))
        reading = probe(taps, embedding)
        without_control = unet(*arguments).sample

    residuals = run_onnx(
        exported,
        "controlnet",
        {**step, "control_map": control_map, "residual_scale": strength[:, None].repeat(1, len(down) + 1)},
    )
    prediction = run_onnx(exported, "unet", {**step, **residuals})
    noise_found = prediction.pop("noise_pred")
    (reading_found,) = run_onnx(exported, "probe", prediction).values()

    # A control branch of zeros would be right, too, and prove nothing.
    assert (noise - without_control).abs().max() > 1e-3
    for found, expected in (
        *zip(residuals.values(), (*down, middle), strict=True),
        *zip(prediction.values(), (*taps, embedding), strict=True),
        (noise_found, noise),
        (reading_found, reading),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def draw(pipe: StableDiffusionControlNetPipeline) -> np.ndarray[Any, Any]:
    edges = torch.zeros(1, 3, 32, 48)
    edges[..., 8:24, 20] = 1
    generator = torch.Generator().manual_seed(7)
    drawn = pipe("a red apple", image=edges, num_inference_steps=3, generator=generator, output_type="np")
    return np.asarray(drawn.images)


def test_what_comes_out_names_a_pipeline_that_draws_it(exported: Path, source: ModelSource) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == ORTStableDiffusionControlNetPipeline.__name__
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]

    found = draw(ORTStableDiffusionControlNetPipeline.from_pretrained(exported))

    expected = draw(load_eager(source, torch.float32))
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_an_export_without_a_controlnet_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not exported with a ControlNet"):
        ORTStableDiffusionControlNetPipeline.from_pretrained(model)
    with pytest.raises(CheckpointError, match="Cannot read .*model_index"):
        ORTStableDiffusionControlNetPipeline.from_pretrained(tmp_path)


def test_optimums_own_loader_says_that_it_does_not_know_it(exported: Path) -> None:
    with pytest.raises(ValueError, match="ORTStableDiffusionControlNetPipeline"):
        ORTDiffusionPipeline.from_pretrained(exported)


def test_scale_zero_is_no_control(exported: Path, source: ModelSource) -> None:
    inputs = {
        "sample": torch.ones(2, 4, 8, 8),
        "timestep": torch.tensor(1.0),
        "prompt_embeds": torch.ones(2, TEXT_LENGTH, 16),
        "control_map": torch.ones(2, 3, 16, 16),
    }
    scale = torch.tensor([[0.0], [1.0]]).repeat(1, 5)
    for residual in run_onnx(exported, "controlnet", {**inputs, "residual_scale": scale}).values():
        assert not residual[0].any()
        assert residual[1].any()


def test_half_precision_keeps_the_timestep(model: Path, source: ModelSource, tmp_path: Path) -> None:
    export(model, tmp_path, {"condition": "canny"}, "--dtype", "fp16", "--atol", "0.1")
    for graph in graphs(source, torch.float16):
        assert interface(tmp_path, graph.name) == described(graph)


def test_controlnet_pipeline_without_a_probe(model: Path, tmp_path: Path) -> None:
    base = StableDiffusionPipeline.from_pretrained(model)
    controlnet = ControlNetModel.from_pretrained(model / "controlnet-canny")
    StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet, requires_safety_checker=False
    ).save_pretrained(tmp_path / "pipeline")
    given = {"condition": "canny", "controlnet": str(tmp_path / "pipeline" / "controlnet"), "probe": "none"}

    found = export(tmp_path / "pipeline", tmp_path / "out", given, "--opset", "17", "--no-dynamic-axes")

    assert not (found / "probe").exists()
    inputs, outputs = interface(found, "unet")
    assert inputs[0] == ("sample", "tensor(float)", [2, 4, 8, 8])
    assert [name for name, _, _ in outputs] == ["noise_pred", "time_embedding"]
    assert interface(found, "controlnet")[0][-1] == ("residual_scale", "tensor(float)", [2, 5])


def test_without_a_condition_all_is_as_ever(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path, None)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.onnx")) == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
    ]
    assert [name for name, _, _ in interface(tmp_path, "unet")[0]] == ["sample", "timestep", "encoder_hidden_states"]


def saved_by_transformers_5(model: Path) -> None:
    (model / "tokenizer" / "vocab.json").unlink()


def without_unet(model: Path) -> None:
    (model / "unet" / "config.json").unlink()


@pytest.mark.parametrize(
    ("kwargs", "damage", "message"),
    [
        ({"condition": "depth"}, None, "has no folder controlnet-depth"),
        (
            {"condition": "canny", "controlnet": "/nowhere"},
            None,
            "/nowhere is neither a file, nor a folder",
        ),
        ({"controlnet": "controlnet-canny"}, None, "needs a condition"),
        ({"condition": "canny", "probe": None}, None, "texts as values"),
        ({"conditon": "canny"}, None, "knows condition, controlnet, probe, but not conditon"),
        ({"condition": "canny", "control": "x"}, None, "but not control"),
        ({"condition": "canny"}, without_unet, "it lacks unet/config.json"),
        ({"condition": "canny"}, saved_by_transformers_5, "was saved by transformers 5"),
    ],
)
def test_wrong_folders_are_named(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kwargs: dict[str, str],
    damage: Callable[[Path], None] | None,
    message: str,
) -> None:
    if damage:
        shutil.copytree(model, tmp_path / "damaged")
        model = tmp_path / "damaged"
        damage(model)
    # In this process: to start optimum-cli takes seconds.
    monkeypatch.setattr("sys.argv", [str(word) for word in command_line(model, tmp_path / "out", kwargs)])

    with pytest.raises(SystemExit, match=message):
        optimum_cli.main()

    assert not (tmp_path / "out").exists()


def test_the_error_is_one_line(model: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        command_line(model / "controlnet-canny", tmp_path / "out", {"condition": "canny"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "controlnet-canny is no base model: it is a ControlNet." in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_random_text_encoders_are_refused(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "five")
    weights = tmp_path / "five" / "text_encoder" / "model.safetensors"
    state = {name.removeprefix("text_model."): tensor for name, tensor in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="transformers 5"), controlled("canny", str(tmp_path / "five")):
        pass


def test_an_export_without_the_parts_is_an_error(model: Path) -> None:
    plain = optimum_parts.get_diffusion_models_for_export
    with pytest.raises(ExportError, match="without the ControlNet"), controlled("canny", str(model)):
        assert optimum_parts.get_diffusion_models_for_export is not plain
    assert optimum_parts.get_diffusion_models_for_export is plain


def test_unregister_leaves_optimum_as_it_was() -> None:
    path = command.unregister()
    try:
        assert not path.exists()
        assert command.unregister() == path
        assert (
            "icexport"
            not in subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True).stdout
        )
    finally:
        assert command.register() == path


def test_starting_optimum_cli_loads_no_torch() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "icexport"


def test_icexport_builds_here_too(model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "icexport", "build", "--cond", "canny", "--model", model, "--batch-size", "1"]
    run = subprocess.run([*words, "--output", tmp_path / "b"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "b" / "reports" / "parity.json").is_file()
