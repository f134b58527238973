"""The reference model in float16: TensorRT-RTX plans without a GPU, and pictures as good as those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from filelock import FileLock

import icexport
from icexport.fidelity.metrics import psnr
from icexport.gates.parity_gate import SIMULATION, simulated
from tests.e2e.drawings import PROMPTS

GRAPHS = {"text_encoder", "controlnet", "unet", "probe", "vae_decoder"}


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> icexport.Bundle:
    """Built once for all test processes."""
    folder = tmp_path_factory.getbasetemp().parent / "reference-fp16"
    options: dict[str, Any] = {"backend": ["onnxruntime", "tensorrt-rtx"], "target_sm": (86, 89, 120)}
    with FileLock(f"{folder}.lock"):
        return icexport.build(
            "canny", dtype="fp16", output=folder, engine_store=folder.with_name("reference-store"), **options
        )


def test_every_graph_has_a_plan_for_three_kinds_of_gpu(half_bundle: icexport.Bundle) -> None:
    plans = [entry for entry in half_bundle.manifest.engines.values() if entry.backend == "tensorrt-rtx"]
    assert {entry.graph for entry in plans} == GRAPHS
    assert {entry.device for entry in plans} == {"sm_86+sm_89+sm_120"}
    assert all(entry.report["precision"]["fp16"] > 0 for entry in plans)
    assert sum(entry.report["parse_seconds"] + entry.report["build_seconds"] for entry in plans) < 60


def test_parity_in_onnx_runtime_and_rounded_as_on_a_gpu(half_bundle: icexport.Bundle) -> None:
    for name in ("onnxruntime", SIMULATION):
        outputs = [output for graph in half_bundle.manifest.parity[name].values() for output in graph.values()]
        assert len(half_bundle.manifest.parity[name]) == len(GRAPHS)
        assert all(output.passed and output.cosine >= 0.999 for output in outputs)


def draw(pipe: Any, control_maps: torch.Tensor) -> list[Any]:
    """What the pipeline returns for each prompt."""
    return [
        pipe(
            prompt,
            image=control_maps[i : i + 1],
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(i),
            output_type="pt",
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def in_float32(pipe: Any, control_maps: torch.Tensor) -> list[Any]:
    return draw(pipe, control_maps)


@pytest.mark.parametrize("how", ["onnxruntime", SIMULATION])
def test_the_same_pictures_as_in_float32(
    half_bundle: icexport.Bundle,
    in_float32: list[Any],
    control_maps: torch.Tensor,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == SIMULATION:
        monkeypatch.setattr(
            "icexport.runtime.loading.load_engine", lambda bundle, graph, **_: simulated(bundle, graph)
        )
    half = icexport.InnerControlPipeline.from_pretrained(half_bundle, backend="onnxruntime")
    half.set_progress_bar_config(disable=True)
    in_float16 = draw(half, control_maps)
    for prompt, one, other in zip(PROMPTS, in_float16, in_float32, strict=True):
        assert float(psnr(one.images.float(), other.images)) >= 30, prompt
    means = [torch.tensor([found.fidelity.scores for found in all_of]).mean() for all_of in (in_float16, in_float32)]
    assert float(means[0]) == pytest.approx(float(means[1]), rel=0.01)
