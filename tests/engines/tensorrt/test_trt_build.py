"""Plans from ONNX files, built by the real TensorRT-RTX without a GPU; and what must not become a plan."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from engines.errors import EngineError
from engines.tensorrt.build import PlanReport, PlanRequest, build_plan
from engines.tensorrt.build_progress import ProgressTree
from engines.tensorrt.onnx_file import OnnxFile
from tests.conftest import once
from tests.engines.tensorrt.onnx_models import FLOAT, HALF, conv, export_mid_blocks, profile, save
from tests.engines.tensorrt.small_builds import build, island, refuse, silent

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="session")
def mid_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``fp32.onnx`` and ``fp16.onnx``; do not write into it."""
    return once(tmp_path_factory, "mid-blocks", export_mid_blocks)


@pytest.fixture
def request_for(mid_blocks: Path, tmp_path: Path) -> Callable[..., PlanRequest]:
    def make(dtype: str = "fp16", **fields: Any) -> PlanRequest:
        profiles = (profile(1, 2, 4),) if dtype == "fp16" else ()
        given = {"onnx": mid_blocks / f"{dtype}.onnx", "profiles": profiles, "targets": (89,), **fields}
        return PlanRequest("tensorrt-rtx", plan=tmp_path / "mid.plan", dtype=dtype, **given)

    return make


# what is built


@pytest.mark.parametrize("targets", [(86,), (89,), (120,), (120, 86, 89), ()])
def test_a_plan_for_any_targets(
    request_for: Callable[..., PlanRequest], tmp_path: Path, targets: tuple[int, ...]
) -> None:
    request = request_for(targets=targets)

    report = build_plan(request, silent)

    assert report.plan_bytes == request.plan.stat().st_size > 10_000
    assert report.targets == targets
    assert report.version.startswith("1.")
    assert report.read_from == "network", "no GPU can load the plan here"
    assert report.layers > 100
    assert report.precision["fp16"] > 100
    assert "fp32" not in report.precision
    assert report.warnings == ()
    assert report.build_seconds > report.parse_seconds > 0
    assert report.peak_memory_bytes is not None
    assert 10**8 < report.peak_memory_bytes < 10**11
    assert [path.name for path in tmp_path.iterdir()] == ["mid.plan"]
    assert PlanReport.from_json(json.loads(json.dumps(report.as_json()))) == report


def test_a_plan_can_be_read_by_whom_the_folder_lets(tmp_path: Path) -> None:
    path = island(tmp_path / "island.onnx")
    build(path)
    assert stat.S_IMODE(path.with_suffix(".plan").stat().st_mode) == stat.S_IMODE(path.stat().st_mode)


def test_precision_is_the_file_s(request_for: Callable[..., PlanRequest]) -> None:
    report = build_plan(request_for("fp32", optimization_level=0, workspace_bytes=1 << 30), silent)
    assert report.precision["fp32"] > 100
    assert "fp16" not in report.precision


def test_several_profiles_share_one_plan(request_for: Callable[..., PlanRequest]) -> None:
    one = build_plan(request_for(profiles=(profile(1, 1, 1),)), silent)
    three = build_plan(request_for(profiles=tuple(profile(n, n, n) for n in (1, 2, 8))), silent)
    assert three.plan_bytes > one.plan_bytes
    assert three.layers == one.layers


def test_progress_rises_to_one(request_for: Callable[..., PlanRequest]) -> None:
    seen: list[tuple[str, float]] = []

    build_plan(request_for(), lambda what, fraction: seen.append((what, fraction)))

    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert seen[0] == ("parsing", 0.0)
    assert fractions[-1] == 1.0
    assert len(set(fractions)) > 10
    assert len(seen) < 110


def test_progress_can_stop_the_builder(request_for: Callable[..., PlanRequest], tmp_path: Path) -> None:
    calls: list[str] = []

    def stop(what: str, fraction: float) -> None:
        calls.append(what)
        if fraction > 0.1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(request_for(), stop)
    assert calls[-1] != "reading back"
    assert list(tmp_path.iterdir()) == []


def test_phases_within_phases_become_one_fraction() -> None:
    tree = ProgressTree()
    tree.start("engine", None, 2)
    tree.start("graph", "engine", 4)
    seen = []
    for step in range(4):
        tree.step("graph", step)
        seen.append(tree.fraction)
    tree.finish("graph")
    tree.start("unrelated", "never started", 1)
    tree.step("unrelated", 0)
    seen.append(tree.fraction)
    tree.step("engine", 0)
    seen.append(tree.fraction)
    tree.step("engine", 1)
    seen.append(tree.fraction)
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 1.0]


# what cannot be asked for


@pytest.mark.parametrize("target", [90, 100])
def test_a_target_that_rtx_does_not_know(request_for: Callable[..., PlanRequest], tmp_path: Path, target: int) -> None:
    request = request_for(targets=(89, target))
    request.plan.write_bytes(b"older plan")

    with pytest.raises(EngineError, match=f"cannot build for sm_{target}") as error:
        build_plan(request, silent)

    assert "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121" in str(error.value)
    assert "Hopper" in str(error.value)
    assert "'tensorrt'" in str(error.value)
    assert request.plan.read_bytes() == b"older plan"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"flavour": "trt"}, "flavour 'trt', expected tensorrt or tensorrt-rtx"),
        ({"dtype": "int8"}, "dtype 'int8', expected one of fp32, fp16, bf16"),
        ({"optimization_level": 6}, "optimisation level 6, expected 0 to 5"),
        ({"workspace_bytes": 0}, "workspace of 0 bytes"),
        ({"profiles": ({"x": ((1,), (3,), (2,))},)}, "profile 0: x .* expected smallest <= usual <= largest"),
        ({"profiles": ({}, {"x": ((1,), (1, 1), (1,))})}, "profile 1: x"),
        ({"profiles": ({"x": ((0,), (1,), (1,))},)}, "profile 0: x"),
        ({"timing_cache": Path("timing.cache")}, "TensorRT-RTX times no kernels"),
        ({"plugins": ("icexport::dual_projection",)}, "TensorRT-RTX takes no plugins"),
        ({"flavour": "tensorrt", "targets": (89,)}, "builds for the GPU at hand only"),
    ],
)
def test_a_request_out_of_range(fields: dict[str, Any], problem: str) -> None:
    good = {"flavour": "tensorrt-rtx", "onnx": Path("a.onnx"), "plan": Path("a.plan"), "dtype": "fp16"}
    with pytest.raises(EngineError, match=problem):
        PlanRequest(**{**good, **fields})


def test_requests_survive_json() -> None:
    shapes = ((1, 4), (2, 4), (8, 4))
    plain = PlanRequest("tensorrt-rtx", Path("a.onnx"), Path("a.plan"), "fp16", ({"x": shapes},), (86, 120))
    full = PlanRequest(
        "tensorrt", Path("a.onnx"), Path("b.plan"), "bf16", ({"x": shapes}, {"x": shapes}), (), 5, 1 << 30,
        Path("timing.cache"), ("icexport::a", "icexport::b"),
    )  # fmt: skip
    for request in (plain, full):
        assert PlanRequest.from_json(json.loads(json.dumps(request.as_json()))) == request


@pytest.mark.parametrize(
    ("profiles", "problem"),
    [
        ((), "sample, prompt_embeds have free axes"),
        (({},), "profile 0 does not fit the graph: sample is missing; prompt_embeds is missing"),
        (
            (profile(1, 1, 1), {**profile(1, 1, 1), "time_embedding": ((1, 16),) * 3}),
            "profile 1 .*time_embedding is not",
        ),
        (({**profile(1, 1, 1), "sample": ((1, 16, 8),) * 3},), "sample is .-1, 16, 8, 8. in the graph, .1, 16, 8. in"),
        (({**profile(1, 1, 1), "sample": ((1, 16, 8, 9),) * 3},), "sample is .* in the graph, .1, 16, 8, 9. in"),
    ],
)
def test_profiles_that_do_not_fit(request_for: Callable[..., PlanRequest], profiles: Any, problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        build_plan(request_for(profiles=profiles), silent)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = island(tmp_path / "island.onnx")
    plan = tmp_path / "missing" / "island.plan"
    with pytest.raises(EngineError, match="cannot write .*island.plan"):
        build_plan(PlanRequest("tensorrt-rtx", path, plan, "fp16"), silent)


# damaged files


def test_a_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "none.onnx", "cannot read the ONNX file .*none.onnx")


@pytest.mark.parametrize(
    ("keep", "problem"), [(0, "holds no graph"), (0.3, "damaged or cut short"), (0.999, "damaged")]
)
def test_a_file_cut_short(mid_blocks: Path, tmp_path: Path, keep: float, problem: str) -> None:
    content = (mid_blocks / "fp16.onnx").read_bytes()
    (tmp_path / "mid.onnx").write_bytes(content[: int(keep * len(content))])
    refuse(tmp_path / "mid.onnx", problem)


def test_weights_that_are_missing_or_cut_short(mid_blocks: Path, tmp_path: Path) -> None:
    for path in mid_blocks.iterdir():
        shutil.copy(path, tmp_path)
    data = tmp_path / "fp16.onnx.data"
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(size - 1)
    refuse(tmp_path / "fp16.onnx", f"fp16.onnx.data, .* is cut short: {size - 1} bytes, expected at least {size}")
    data.unlink()
    refuse(tmp_path / "fp16.onnx", "fp16.onnx.data, which is missing")


# graphs that the library does not take


def test_an_op_that_is_not_of_onnx(tmp_path: Path) -> None:
    fancy = helper.make_node("Fancy", ["a"], ["y"], name="node_fancy", domain="my.ops")
    fancy.metadata_props.add(
        key="pkg.torch.onnx.name_scopes", value="['', 'unet', 'unet.mid_block', 'unet.mid_block.act', 'fancy']"
    )
    node, weight = conv("first", "x", "a", HALF)
    path = save(tmp_path / "fancy.onnx", [node, fancy], dict.fromkeys("xay", HALF), [weight])

    said = refuse(path, "does not take fancy.onnx")

    assert "node 'node_fancy' (my.ops::Fancy, from module unet.mid_block.act)" in said
    assert "Plugin not found" in said
    assert "build from a graph without it" in said


def test_an_onnx_op_that_the_library_lacks(tmp_path: Path) -> None:
    node = helper.make_node("Unique", ["x"], ["y"], name="node_unique")
    node.metadata_props.add(key="namespace", value=": Net/net.sorter: Sorter/node_unique: aten.unique")
    path = save(tmp_path / "unique.onnx", [node], dict.fromkeys("xy", FLOAT))

    said = refuse(path, "does not take unique.onnx", "fp32")

    assert "node 'node_unique' (Unique, from module : Net/net.sorter: Sorter" in said
    assert "UNSUPPORTED_NODE. Export the graph at another opset" in said
    assert "'onnxruntime'" in said


def test_attention_with_narrow_heads_at_opset_23(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="node_attention")
    path = save(tmp_path / "narrow.onnx", [node], dict.fromkeys("qkvy", FLOAT), shape=(1, 2, 16, 4), opset=23)
    refuse(path, "could not build the engine: .*dedicated kernel.*export at opset 21", "fp32")


def test_nodes_are_named_by_index_where_they_have_no_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])], dict.fromkeys("xy", HALF))
    source = OnnxFile(path)
    assert source.describe(0) == "node 0 (Relu, from an unknown module)"
    assert source.describe(-1) == source.describe(7) == "the graph"
    assert source.describe(-1, "inner") == "node 'inner'"
