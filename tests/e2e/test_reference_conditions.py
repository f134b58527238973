"""The other conditions of the embedded reference model: their ControlNets are obeyed, and they build and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

import icexport
from icexport import conditions
from icexport.conditions import Condition
from icexport.fidelity.metrics import gaussian_filter
from icexport.host.pixels import to_pixels
from icexport.models.probe import InnerControlProbe
from tests.e2e.drawings import PROMPTS, drawing
from training.data.scenes import HELD_OUT, render_many

COUNT = 6


def pictures(name: str, maps: torch.Tensor, prompts: list[str], scale: float) -> torch.Tensor:
    folder = icexport.reference_path()
    controlnet = ControlNetModel.from_pretrained(folder / f"controlnet-{name}")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=controlnet, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(
        prompts,
        image=maps,
        num_inference_steps=12,
        guidance_scale=3.0,
        controlnet_conditioning_scale=scale,
        generator=generators,
        output_type="pt",
    ).images


def scores(condition: Condition, maps: torch.Tensor, prompts: list[str]) -> tuple[float, float]:
    """With and without control."""
    found = (condition.score(pictures(condition.name, maps, prompts, scale), maps) for scale in (1.0, 0.0))
    controlled, free = (float(score.mean()) for score in found)
    return controlled, free


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return torch.cat([to_pixels(drawing(i)) for i in range(min(COUNT, len(PROMPTS)))])


def test_depth_is_obeyed() -> None:
    scenes = render_many(range(HELD_OUT, HELD_OUT + COUNT))
    maps = torch.from_numpy(scenes.depth)[:, None].expand(-1, 3, -1, -1).float() / 255
    controlled, free = scores(conditions.of_model("depth", "reference"), maps, scenes.captions)
    assert controlled < 0.7 * free, (controlled, free)


def test_lineart_is_obeyed(drawn: torch.Tensor) -> None:
    lineart = conditions.get("lineart")
    controlled, free = scores(lineart, lineart.extract_batch(drawn), list(PROMPTS[: len(drawn)]))
    assert controlled > free + 0.2, (controlled, free)


def test_soft_edges_are_obeyed(drawn: torch.Tensor) -> None:
    # HED's weights are in a package of their own; blurred edges are near enough for a ControlNet that learnt from it.
    canny = conditions.get("canny")
    edges = canny.extract_batch(drawn)
    soft = gaussian_filter(torch.nn.functional.pad(edges, (3,) * 4), 0.8, 3)
    soft = (soft / soft.amax((1, 2, 3), keepdim=True)).clamp(0, 1)
    found = [pictures("hed", soft, list(PROMPTS[: len(drawn)]), scale) for scale in (1.0, 0.0)]
    controlled, free = (float(canny.score(each, edges).mean()) for each in found)
    assert controlled > free + 0.2, (controlled, free)


@pytest.mark.parametrize("name", conditions.names())
def test_every_condition_has_a_probe_of_its_own(name: str) -> None:
    probe = InnerControlProbe.from_pretrained(icexport.reference_path() / f"probe-{name}")
    assert probe.config.condition == name


def test_a_depth_bundle_needs_no_download(tmp_path: Path) -> None:
    bundle = icexport.build("depth", output=tmp_path / "depth", backend="onnxruntime", verify=False)
    scene = Image.fromarray(render_many([HELD_OUT]).images[0])
    depth = bundle.condition().extract(scene)
    pipe = icexport.InnerControlPipeline.from_pretrained(bundle)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a red ball", image=depth, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert out.fidelity.scores is not None
    assert 0 <= out.fidelity.scores[0] < 128
