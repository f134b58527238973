"""Prompts of more tokens than the text encoder makes, as embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import icexport
from icexport.bundle.manifest import Manifest
from icexport.bundle.store import Bundle
from icexport.errors import UsageError
from icexport.runtime.pipeline import InnerControlPipeline
from tests.conftest import once

CONTROL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).round()


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    options: dict[str, Any] = {"model": str(tiny_model), "backend": "onnxruntime", "batch_size": 1}
    return once(
        tmp_path_factory,
        "long-bundle",
        lambda folder: icexport.build("canny", text_length="6:12:36", output=folder, **options),
    )


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> StableDiffusionControlNetPipeline:
    controlnet = ControlNetModel.from_pretrained(tiny_model / "controlnet-canny")
    return StableDiffusionControlNetPipeline.from_pretrained(tiny_model, controlnet=controlnet, safety_checker=None)


def draw(pipe: Any, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    text, empty = torch.randn(2, 1, tokens, 16, generator=generator)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    found: torch.Tensor = pipe(image=CONTROL, prompt_embeds=text, negative_prompt_embeds=empty, **options).images
    return found


@pytest.mark.parametrize("tokens", [6, 12, 24, 36])
def test_same_as_diffusers(long_bundle: Path, theirs: StableDiffusionControlNetPipeline, tokens: int) -> None:
    ours = InnerControlPipeline.from_pretrained(long_bundle)
    assert torch.allclose(draw(ours, tokens), draw(theirs, tokens), atol=1e-4)


def test_it_is_in_the_graphs_and_the_manifest(long_bundle: Path) -> None:
    bundle = Bundle(long_bundle)
    for name in ("controlnet", "unet"):
        model = onnx.load(bundle.onnx(name), load_external_data=False)
        (embeds,) = (value for value in model.graph.input if value.name == "prompt_embeds")
        assert embeds.type.tensor_type.shape.dim[1].dim_param == "tokens"
        assert any("36 tokens" in case or "6 tokens" in case for case in cases_of(bundle, name))
    assert str(bundle.manifest.profile.text) == "6:12:36"
    assert Manifest.read(long_bundle).profile == bundle.manifest.profile
    assert "--text-length 6:12:36" in bundle.manifest.rebuild_command(long_bundle, ["onnxruntime"])


def cases_of(bundle: Bundle, graph: str) -> list[str]:
    """Names of the cases on which a graph is judged."""
    from icexport.bundle.source import recorded_source
    from icexport.graphs.split import split
    from icexport.models.sizes import size_multiple
    from icexport.parity.cases import cases

    source, profile = recorded_source(bundle), bundle.manifest.profile
    multiple = size_multiple(source.config("unet"), source.config("vae"))
    graphs = {found.name: found for found in split(source, torch.float32, profile)}
    return [case.name for case in cases(graphs[graph], profile, multiple)]


@pytest.mark.parametrize("tokens", [5, 37])
def test_other_lengths_are_named(long_bundle: Path, tokens: int) -> None:
    pipe = InnerControlPipeline.from_pretrained(long_bundle)
    with pytest.raises(UsageError, match=rf"\(1, {tokens}, 16\).*S = 6:12:36 tokens\. For others, build with"):
        draw(pipe, tokens)


def test_wrong_lengths(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--text-length 20:24:36: the model's own text encoder makes 12 tokens"):
        icexport.build("canny", model=str(tiny_model), text_length="20:24:36", output=tmp_path / "bundle")
    with pytest.raises(UsageError, match="Cannot read the size 'long'"):
        icexport.build("canny", model=str(tiny_model), text_length="long", output=tmp_path / "bundle")
