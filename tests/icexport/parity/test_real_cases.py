from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from icexport import conditions
from icexport.graphs.graph import size_of
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.split import split
from icexport.models.source import ModelSource
from icexport.parity import real_cases as activations
from icexport.parity.cases import Case
from icexport.parity.compare import COSINE_ERROR, Expected
from tests.tiny_models import TEXT_LENGTH


def drawn(model: Path, pictures: int = 1, probe: str | None = None, **options: Any) -> dict[str, list[Expected]]:
    profile = Profile(SizeRange(pictures, pictures, 4), SizeRange(16, 16, 32), SizeRange(16, 24, 32))
    source = ModelSource.find("canny", str(model), probe=probe)
    return activations.real_cases(list(split(source, torch.float32)), source, profile, **options)


def cases_of(model: Path, **options: Any) -> dict[str, list[Case]]:
    return {name: [one.case for one in found] for name, found in drawn(model, **options).items()}


@pytest.fixture(scope="module")
def real(tiny_model: Path) -> dict[str, list[Case]]:
    return cases_of(tiny_model)


def test_every_graph_gets_inputs_that_fit(real: dict[str, list[Case]], tiny_model: Path) -> None:
    names = {name: [case.name for case in cases] for name, cases in real.items()}
    steps = ["real step 1", "real step 4"]
    assert names == {
        "text_encoder": ["real empty prompt", "real prompt"],
        "controlnet": steps,
        "unet": steps,
        "probe": steps,
        "vae_decoder": ["real picture"],
    }
    for graph in split(ModelSource.find("canny", str(tiny_model)), torch.float32):
        symbols = {"prompts": 1, "pictures": 1, "samples": 2, "rows": 4, "columns": 6}
        for case in real[graph.name]:
            assert list(case.inputs) == [spec.name for spec in graph.inputs]
            for spec in graph.inputs:
                value = case.inputs[spec.name]
                assert tuple(value.shape) == tuple(size_of(d, symbols) for d in spec.shape), spec
                assert value.dtype == spec.dtype
                assert value.isfinite().all()


def test_they_are_what_the_model_computes(real: dict[str, list[Case]], tiny_model: Path) -> None:
    by_name = {graph.name: graph for graph in split(ModelSource.find("canny", str(tiny_model)), torch.float32)}
    with torch.inference_mode():
        residuals = by_name["controlnet"].module(*real["controlnet"][1].inputs.values())
        *_, tap, embedding = by_name["unet"].module(*real["unet"][1].inputs.values())
        embeds = [by_name["text_encoder"].module(*case.inputs.values())[0] for case in real["text_encoder"]]

    torch.testing.assert_close(real["unet"][1].inputs["mid_residual"], residuals[-1])
    torch.testing.assert_close(real["unet"][1].inputs["prompt_embeds"], torch.cat(embeds))
    torch.testing.assert_close(real["probe"][1].inputs["tap_3"], tap[1:])
    torch.testing.assert_close(real["probe"][1].inputs["time_embedding"], embedding[1:])


def test_what_was_computed_is_what_is_expected(tiny_model: Path) -> None:
    told: list[tuple[str, float | None, float]] = []
    found = drawn(tiny_model, progress=lambda step, done=None, total=1.0: told.append((step, done, total)))

    assert told == [(activations.DRAWING, None, 1.0), *((activations.DRAWING, n, 4) for n in (1, 2, 3, 4))]
    by_name = {graph.name: graph for graph in split(ModelSource.find("canny", str(tiny_model)), torch.float32)}
    for name, graph in by_name.items():
        for one in found[name]:
            assert all(torch.equal(v, one.outputs[n]) for n, v in graph.engine()(one.case.inputs).items())
            assert set(one.allowed.values()) == {COSINE_ERROR}


def test_the_picture_becomes_clear(real: dict[str, list[Case]]) -> None:
    assert [case.inputs["timestep"].tolist() for case in real["unet"]] == [[999, 999], [249, 249]]
    first, last = (real["unet"][i].inputs["sample"] for i in (0, -1))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, last)
    assert real["text_encoder"][0].inputs["input_ids"].shape == (1, TEXT_LENGTH)
    assert not torch.equal(*(case.inputs["input_ids"] for case in real["text_encoder"]))


def test_seeded(real: dict[str, list[Case]], tiny_model: Path) -> None:
    again = cases_of(tiny_model)

    for name, cases in again.items():
        for case, other in zip(cases, real[name], strict=True):
            assert all(torch.equal(value, other.inputs[key]) for key, value in case.inputs.items())


def test_fixed_batches_and_no_probe(tiny_model: Path) -> None:
    found = cases_of(tiny_model, pictures=3, probe="none", steps=1)

    assert "probe" not in found
    assert found["unet"][0].inputs["sample"].shape == (6, 4, 8, 12)
    assert found["controlnet"][0].inputs["residual_scale"].shape == (6, 5)
    assert found["vae_decoder"][0].inputs["latents"].shape[0] == 3


def test_control_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edges = activations.control_picture(conditions.get("canny"), 64, 96)
    assert edges.shape == (1, 3, 64, 96)
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert 0.02 < edges.mean() < 0.3

    with caplog.at_level(logging.WARNING):
        plain = activations.control_picture(conditions.get("hed", weights=tmp_path / "none.safetensors"), 64, 64)
    assert plain.unique().numel() > 5
    assert "plain drawing as the control map: The HED weights" in caplog.text
