from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from icexport.errors import UnsupportedOptionError
from icexport.graphs import stable_diffusion as g
from icexport.graphs.graph import example_inputs, size_of
from icexport.models.sizes import latent_multiple, residual_channels, size_multiple, vae_factor
from icexport.models.source import ModelSource
from icexport.models.taps import Taps
from tests.tiny_models import TEXT_LENGTH, tiny_probe, tiny_unet

F32 = torch.float32
SYMBOLS = {"samples": 2, "pictures": 2, "prompts": 2, "rows": 5, "columns": 4}


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> ModelSource:
    return ModelSource.find("canny", str(tiny_model))


@pytest.fixture(scope="module")
def unet(source: ModelSource) -> UNet2DConditionModel:
    return source.unet(F32)


@pytest.fixture(scope="module")
def all_graphs(source: ModelSource, unet: UNet2DConditionModel) -> dict[str, g.Graph]:
    probe = source.probe_model(F32)
    assert probe is not None
    found = (
        g.text_encoder_graph(source.text_encoder(F32), F32),
        g.controlnet_graph(source.controlnet_model(F32), TEXT_LENGTH, 2, F32),
        g.unet_graph(unet, TEXT_LENGTH, probe.config, F32),
        g.probe_graph(probe, unet, F32),
        g.vae_decoder_graph(source.vae(F32), 2, F32),
    )
    return {graph.name: graph for graph in found}


def run(graph: g.Graph, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    inputs = example_inputs(graph.inputs, SYMBOLS) | (inputs or {})
    with torch.no_grad():
        outputs = graph.module(*inputs.values())
    return dict(zip([spec.name for spec in graph.outputs], outputs, strict=True))


def test_names_are_in_order(all_graphs: dict[str, g.Graph]) -> None:
    assert tuple(all_graphs) == g.GRAPH_NAMES


@pytest.mark.parametrize("name", g.GRAPH_NAMES)
def test_shapes_are_as_described(all_graphs: dict[str, g.Graph], name: str) -> None:
    graph = all_graphs[name]
    found = run(graph)

    for spec in graph.outputs:
        assert tuple(found[spec.name].shape) == tuple(size_of(d, SYMBOLS) for d in spec.shape), spec
        assert found[spec.name].dtype == spec.dtype


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_text_encoder_skips_layers(all_graphs: dict[str, g.Graph], source: ModelSource, skip: int) -> None:
    encoder = source.text_encoder(F32)
    ids = torch.tensor([[1, 5, 9, *([2] * (TEXT_LENGTH - 3))], [7, 7, 8, *([2] * (TEXT_LENGTH - 3))]])
    with torch.no_grad():
        state = encoder(ids, output_hidden_states=True).hidden_states[-1 - skip]
        expected = getattr(encoder, "text_model", encoder).final_layer_norm(state)

    found = run(all_graphs["text_encoder"], {"input_ids": ids, "clip_skip": torch.tensor(skip)})

    torch.testing.assert_close(found["prompt_embeds"], expected)


def test_residuals_are_scaled_one_by_one(all_graphs: dict[str, g.Graph], source: ModelSource) -> None:
    graph = all_graphs["controlnet"]
    inputs = example_inputs(graph.inputs, SYMBOLS, seed=3)
    with torch.no_grad():
        down, mid = source.controlnet_model(F32)(*list(inputs.values())[:4], return_dict=False)

    found = run(graph, inputs)

    for index, (name, plain) in enumerate(zip(found, [*down, mid], strict=True)):
        scale = inputs["residual_scale"][:, index, None, None, None]
        torch.testing.assert_close(found[name], plain * scale)
        assert plain.abs().max() > 1e-4, f"{name} is zero: this test would prove nothing"


def test_unet_gives_prediction_taps_and_time(all_graphs: dict[str, g.Graph], unet: UNet2DConditionModel) -> None:
    graph = all_graphs["unet"]
    inputs = example_inputs(graph.inputs, SYMBOLS, seed=4)
    *residuals, mid = list(inputs.values())[3:]
    time = inputs["timestep"] = torch.tensor([700.0, 20.0])
    with torch.no_grad(), Taps(unet, "attn").record() as taps:
        (expected,) = unet(
            inputs["sample"],
            time,
            inputs["prompt_embeds"],
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=mid,
            return_dict=False,
        )
        embedding = unet.time_embedding(unet.time_proj(time))

    found = run(graph, inputs)

    torch.testing.assert_close(found["noise_pred"], expected)
    torch.testing.assert_close(found["time_embedding"], embedding)
    for index, tap in enumerate(taps):
        torch.testing.assert_close(found[f"tap_{index}"], tap)
    assert not unet.time_embedding._forward_hooks, "the graph left a hook behind"


def test_a_mirrored_probe_gets_the_mirrored_time(unet: UNet2DConditionModel) -> None:
    config = dataclasses.replace(tiny_probe(unet).config, timestep_convention="mirrored")
    true = g.unet_graph(unet, TEXT_LENGTH, dataclasses.replace(config, timestep_convention="true"), F32)
    mirrored = g.unet_graph(unet, TEXT_LENGTH, config, F32)

    found = run(mirrored, {"timestep": torch.tensor([300.0, 1.0])})

    expected = run(true, {"timestep": torch.tensor([700.0, 999.0])})["time_embedding"]
    torch.testing.assert_close(found["time_embedding"], expected)
    expected = run(true, {"timestep": torch.tensor([300.0, 1.0])})["noise_pred"]
    torch.testing.assert_close(found["noise_pred"], expected)


@pytest.mark.parametrize("name", ["controlnet", "unet"])
def test_each_sample_has_its_own_timestep(all_graphs: dict[str, g.Graph], name: str) -> None:
    graph = all_graphs[name]
    inputs = example_inputs(graph.inputs, SYMBOLS, seed=4) | {"timestep": torch.tensor([900.0, 100.0])}

    both = run(graph, inputs)

    for row in range(2):
        alone = run(graph, {key: value[row : row + 1] for key, value in inputs.items()})
        for key, value in both.items():
            torch.testing.assert_close(value[row : row + 1], alone[key], rtol=1e-4, atol=1e-5)


def test_a_unet_without_a_probe_has_no_taps(unet: UNet2DConditionModel) -> None:
    assert [spec.name for spec in g.unet_graph(unet, TEXT_LENGTH, None, F32).outputs] == [
        "noise_pred",
        "time_embedding",
    ]


def test_the_probe_reads_each_picture_at_its_own_time(all_graphs: dict[str, g.Graph], source: ModelSource) -> None:
    inputs = example_inputs(all_graphs["probe"].inputs, SYMBOLS)
    *taps, embedding = inputs.values()
    probe = source.probe_model(F32)
    assert probe is not None
    with torch.no_grad():
        expected = probe(taps, embedding)
    assert not torch.equal(embedding[0], embedding[1])

    torch.testing.assert_close(run(all_graphs["probe"], inputs)["reading"], expected)


def test_the_decoder_decodes(all_graphs: dict[str, g.Graph], source: ModelSource) -> None:
    latents = torch.randn(2, 4, 10, 8)
    with torch.no_grad():
        expected = source.vae(F32).decode(latents).sample

    torch.testing.assert_close(run(all_graphs["vae_decoder"], {"latents": latents})["pixels"], expected)


def test_globally_pooled_controlnets_are_refused() -> None:
    pooled = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(8, 16))
    pooled.register_to_config(global_pool_conditions=True)

    with pytest.raises(UnsupportedOptionError, match=r"pools its residuals globally .*canny, hed"):
        g.controlnet_graph(pooled, TEXT_LENGTH, 2, F32)


def test_residuals_of_stable_diffusion() -> None:
    found = residual_channels({"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2})

    assert found == (
        *((320, 1),) * 3,
        *((320, 2), (640, 2), (640, 2)),
        *((640, 4), (1280, 4), (1280, 4)),
        *((1280, 8),) * 4,
    )
    assert residual_channels({"block_out_channels": (8, 16), "layers_per_block": [1, 2]}) == (
        *((8, 1), (8, 1), (8, 2)),
        *((16, 2), (16, 2), (16, 2)),
    )


def test_multiples() -> None:
    stable_diffusion = {"block_out_channels": (320, 640, 1280, 1280)}
    vae = {"block_out_channels": (128, 256, 512, 512)}

    assert vae_factor(vae) == 8
    assert latent_multiple(stable_diffusion) == 8
    assert size_multiple(stable_diffusion, vae) == 64
