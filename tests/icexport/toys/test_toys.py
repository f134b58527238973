"""A condition, a scheduler choice, a precision and a model family are one object each: toys, known to nobody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import icexport
from icexport import conditions
from icexport.bundle.store import Bundle
from icexport.conditions import Condition
from icexport.errors import CheckpointError, UsageError
from icexport.graphs import stable_diffusion
from icexport.graphs.graph import Graph
from icexport.models import family, precision
from icexport.models.source import ModelSource
from icexport.runtime.schedulers import CHOICES, SchedulerChoice, choose_scheduler
from training import presets
from training.evaluation.metrics import metrics_of, score_pictures


@dataclass(frozen=True)
class Brightness(Condition):
    """How bright each pixel is."""

    name: ClassVar[str] = "brightness"
    polarity: ClassVar[str] = "bright is white"
    metric: ClassVar[str] = "mean error"
    unit: ClassVar[str] = "ratio"
    higher_is_better: ClassVar[bool] = False

    gain: float = 1.0

    def _extract(self, pixels: Tensor) -> Tensor:
        return (self.gain * pixels.mean(1, keepdim=True)).clamp(0, 1)

    def _compare(self, readings: Tensor, control_maps: Tensor) -> Tensor:
        return (readings - control_maps).abs().mean((1, 2, 3))


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_CONDITIONS", dict(conditions._CONDITIONS))
    conditions.register(Brightness)


def model_of(tiny_model: Path, folder: Path, condition: str) -> Path:
    """A copy of the tiny model whose ControlNet and probe are for another condition."""
    shutil.copytree(tiny_model, folder)
    for part in ("controlnet", "probe"):
        (folder / f"{part}-canny").rename(folder / f"{part}-{condition}")
    config = folder / f"probe-{condition}" / "config.json"
    config.write_text(config.read_text().replace('"canny"', f'"{condition}"'))
    return folder


def draw(folder: Path) -> Any:
    pipe = icexport.InnerControlPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a", torch.full((1, 3, 16, 16), 0.5), num_inference_steps=1, output_type="pt")


@pytest.mark.usefixtures("brightness")
def test_a_condition_builds_draws_and_scores(tiny_model: Path, tmp_path: Path) -> None:
    model = model_of(tiny_model, tmp_path / "model", "brightness")
    bundle = icexport.build("brightness", model=str(model), backend="torch", output=tmp_path / "bundle", verify=False)
    assert bundle.manifest.condition.metric == "mean error"
    found = draw(bundle.path)
    expected = (found.images.mul(255).round().div(255).mean(1) - 0.5).abs().mean()
    assert found.fidelity.scores == [pytest.approx(float(expected), abs=2e-3)]
    assert (found.fidelity.condition, found.fidelity.higher_is_better) == ("brightness", False)


@pytest.mark.usefixtures("brightness")
def test_a_condition_can_be_trained_and_evaluated() -> None:
    condition = conditions.get("brightness", gain=0.5)
    pictures, controls = torch.ones(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    (metric,) = metrics_of(condition).values()
    assert (metric.title, metric.higher_is_better) == ("mean error", False)
    scores = score_pictures(condition, pictures, controls)
    torch.testing.assert_close(scores["score"], torch.full((2,), 0.5), atol=2e-3, rtol=0)
    assert presets.preset("finetune", "brightness").loss.alpha == 0
    with pytest.raises(UsageError, match="Nothing is published of innercontrol for condition 'brightness'.*finetune"):
        presets.preset("innercontrol", "brightness")


def test_a_scheduler_choice(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = SchedulerChoice("toy", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3})
    monkeypatch.setitem(CHOICES, "toy", choice)
    own = icexport.InnerControlPipeline.from_pretrained(tiny_bundle).scheduler
    found = choose_scheduler("Toy", own)
    assert type(found).__name__ == "DPMSolverMultistepScheduler"
    assert (found.config.use_karras_sigmas, found.config.solver_order) == (True, 3)
    assert found.config.beta_end == own.config.beta_end
    with pytest.raises(UsageError, match="Those that do: .*toy.*DDIM"):
        choose_scheduler("FlowMatchEulerDiscrete", own)


def test_a_precision(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = replace(precision.PRECISIONS["fp16"], name="loose-fp16", floor=0.5)
    monkeypatch.setitem(precision.PRECISIONS, "loose-fp16", toy)
    options: dict[str, Any] = {"model": str(tiny_model), "dtype": "loose-fp16", "batch_size": 1}
    bundle = icexport.build("canny", backend="torch", output=tmp_path / "bundle", **options)
    assert bundle.manifest.dtype == "loose-fp16"
    assert bundle.manifest.tolerances["floor"] == 0.5
    outputs = bundle.manifest.parity["torch"]["unet"]
    assert outputs["noise_pred"].allowed_error == 0.5
    assert draw(bundle.path).images.isfinite().all()
    with pytest.raises(UsageError, match="--dtype loose-fp16: backend onnxruntime takes fp32 or fp16"):
        icexport.build("canny", backend="onnxruntime", output=tmp_path / "other", **options)


SPLITS: list[str] = []


def split(source: ModelSource, dtype: torch.dtype) -> Iterator[Graph]:
    """The graphs of the toy family: Stable Diffusion's."""
    SPLITS.append(source.family.name)
    return stable_diffusion.split(source, dtype)


def test_a_family(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = replace(
        family.STABLE_DIFFUSION,
        name="toy",
        title="Toys",
        pipelines=("ToyPipeline",),
        needed=(*family.STABLE_DIFFUSION.needed, "toy.txt"),
        unsupported={"vae": ("toy",)},
        graphs=__name__,
    )
    monkeypatch.setitem(family.FAMILIES, "toy", toy)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    options: dict[str, Any] = {"model": str(model), "backend": "torch", "output": tmp_path / "bundle"}
    with pytest.raises(CheckpointError, match=r"no folder of Toys .* it lacks toy\.txt"):
        icexport.build("canny", **options)
    (model / "toy.txt").touch()
    config = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps({**config, "toy": 1}))
    with pytest.raises(UsageError, match="vae has toy = 1, which Toys do not"):
        icexport.build("canny", **options)
    (model / "vae" / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(globals(), "SPLITS", [])
    bundle = icexport.build("canny", **options)
    assert bundle.manifest.source.family == "toy"
    assert Bundle(bundle.path).manifest.parity["torch"]["unet"]["noise_pred"].passed
    assert draw(bundle.path).images.shape == (1, 3, 16, 16)
