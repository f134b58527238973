from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.errors import BackendUnavailableError, EngineError
from engines.kernels import aot, plugins
from engines.kernels.host import load_kernel
from engines.kernels.plugins import Call, choose_launch, compile_kernel, kernel_hash, register
from tests.engines.kernels.ptx import parameters, resources
from tests.engines.tensorrt.bindings import ROOT, environment

VERSIONS = ("10.9.0.34", "10.16.1.11", "11.4.0.106")

Node = tuple[str, dict[str, tuple[int, ...]], dict[str, float]]


def projection(batch: int = 2, channels: int = 40, outputs: int = 24, height: int = 6, width: int = 10) -> Node:
    return "dual_projection", {"x": (batch, channels, height, width), "weight": (outputs, channels)}, {}


def norm(batch: int = 2, size: tuple[int, int] = (4, 6), rows: int = 1, to: tuple[int, int] = (8, 12)) -> Node:
    shapes = {"x": (batch, 40, *size), "gamma": (16,), "beta": (16,), "shift": (rows, 16)}
    attributes = {"first_channel": 3, "height": to[0], "width": to[1], "num_groups": 4, "eps": 1e-5}
    return "resize_group_norm_relu", shapes, attributes


def mix(batch: int = 2, size: tuple[int, int] = (4, 6), normalise: bool = True) -> Node:
    vectors = dict.fromkeys(("main_gamma", "main_beta", "skip_gamma", "skip_beta"), (16,))
    maps = {"accumulated": (batch, 16, 8, 12), "main": (batch, 16, 8, 12), "skip": (batch, 24, *size)}
    attributes = {"index": 5, "first_channel": 7, "num_groups": 2, "eps": 1e-6, "normalise_skip": int(normalise)}
    return "residual_mix", {**maps, **vectors, "mix": (9,)}, attributes


NODES = [
    projection(),
    projection(1, 33, 65, 1, 129),
    norm(),
    norm(3, rows=3),
    norm(1, (8, 12)),
    norm(1, (8, 6)),
    mix(),
    mix(3, (8, 12)),
    mix(1, (8, 12), normalise=False),
    mix(1, normalise=False),
]


def call_of(node: Node, capability: Any = 80, dtype: torch.dtype = torch.float16) -> Call:
    _, shapes, attributes = node
    batch = next(iter(shapes.values()))[0]
    return Call(shapes, attributes, batch, batch, dtype, capability)


class Recorder:
    """In place of a kernel: keeps what it is launched with."""

    grid: Any = None
    arguments: tuple[Any, ...] = ()
    named: dict[str, Any]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.grid, self.arguments, self.named = grid, arguments, named

        return launch


@pytest.mark.parametrize("node", NODES, ids=[f"{name}-{index}" for index, (name, *_) in enumerate(NODES)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_plugin_launches_as_the_operator_does(
    monkeypatch: pytest.MonkeyPatch, node: Node, dtype: torch.dtype
) -> None:
    name, shapes, attributes = node
    module, recorder = load_kernel(name), Recorder()
    monkeypatch.setattr(module, "KERNEL", recorder)
    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes.values()]
    result = getattr(torch.ops.icexport, name)(*tensors, *attributes.values())
    module.launch(*tensors, *attributes.values(), result)

    found = choose_launch(name, call_of(node, None, dtype))

    assert found.grid == recorder.grid
    assert found.scalars == recorder.arguments[len(tensors) : -1]
    named = {**found.constants, **found.config.constants, **found.config.options}
    assert named == recorder.named
    assert plugins._definition(name).output_shape(shapes, attributes) == tuple(result.shape)


def test_a_free_batch_only_scales_the_grid() -> None:
    class Symbol:
        def __mul__(self, other: int) -> str:
            return f"B*{other}"

    symbol = Symbol()
    for node in (projection(), norm(), mix()):
        call = call_of(node)
        free = {name: (None, *shape[1:]) if shape[0] == 2 else shape for name, shape in call.shapes.items()}

        known, found = (choose_launch(node[0], c) for c in (call, replace(call, shapes=free, batch=symbol)))

        assert replace(found, grid=known.grid) == known
        groups = node[2].get("num_groups")
        assert found.grid == ((f"B*{groups}", known.grid[1]) if groups else (known.grid[0], symbol))


def test_a_shift_with_a_free_batch_is_one_a_sample() -> None:
    call = call_of(norm())

    assert choose_launch("resize_group_norm_relu", call).constants["SHIFT_PER_SAMPLE"] is False
    free = replace(call, shapes={**call.shapes, "shift": (None, 16)})
    assert choose_launch("resize_group_norm_relu", free).constants["SHIFT_PER_SAMPLE"] is True


def test_ptx_takes_what_tensorrt_passes() -> None:
    node = norm()
    call = call_of(node)
    launch = choose_launch(node[0], call)

    ptx = compile_kernel(node[0], call, launch)

    kinds = [re.split(r"\s+", parameter)[1] for parameter in parameters(ptx.text)]
    assert kinds == [".u64"] * len(node[1]) + [".u32"] * len(launch.scalars) + [".u64"]
    assert ptx.num_warps == launch.config.num_warps
    assert resources(ptx, 80).registers > 0


@dataclass
class Compiler:
    """In place of the compiler: shared memory grows with the stages, and nothing is compiled."""

    stage: int
    calls: list[dict[str, Any]]

    def __call__(self, kernel: Any, *arguments: Any, aligned: Any) -> aot.Ptx:
        names = ("signature", "constants", "capability", "num_warps", "num_stages")
        self.calls.append(dict(zip(names, arguments, strict=True)) | {"aligned": set(aligned)})
        *_, num_warps, num_stages = arguments
        return aot.Ptx(kernel.__name__, "", self.stage * num_stages, num_warps)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler(1024, [])
    monkeypatch.setattr(aot, "compile_ptx", fake)
    return fake


@pytest.mark.parametrize("node", [projection(height=8, width=16), norm(), mix()], ids=lambda node: node[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_compiled_for_the_node(compiler: Compiler, node: Node, dtype: torch.dtype) -> None:
    call = call_of(node, 90, dtype)
    launch = choose_launch(node[0], call)

    compile_kernel(node[0], call, launch)

    (found,) = compiler.calls
    kinds = list(found["signature"].values())
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    runtime = [pointer] * len(node[1]) + ["i32"] * len(launch.scalars) + [pointer]
    assert kinds == runtime + ["constexpr"] * (len(kinds) - len(runtime))
    constexprs = {name for name, kind in found["signature"].items() if kind == "constexpr"}
    assert found["constants"].keys() == constexprs
    arguments = list(found["signature"])
    scalars = dict(zip(arguments[len(node[1]) :], launch.scalars, strict=False))
    even = {name for name, value in scalars.items() if value % 16 == 0}
    assert found["aligned"] == {name for name in arguments if name.endswith("_ptr")} | even
    assert even
    assert even != set(scalars)
    assert (found["num_warps"], found["num_stages"]) == (launch.config.num_warps, launch.config.num_stages)


@pytest.mark.parametrize(("capability", "target"), [(90, 90), (120, 120), (103, 80), (87, 80), (130, 80)])
def test_unknown_architectures_take_the_portable_code(compiler: Compiler, capability: int, target: int) -> None:
    node = projection()
    call = call_of(node, capability)

    compile_kernel(node[0], call, choose_launch(node[0], call))

    assert compiler.calls[0]["capability"] == target


def test_shared_memory_stays_within_what_every_launch_may_have(compiler: Compiler) -> None:
    node = projection()
    call = call_of(node)
    launch = choose_launch(node[0], call)
    launch = replace(launch, config=replace(launch.config, num_stages=4))

    compiler.stage = 16 * 1024
    assert compile_kernel(node[0], call, launch).shared_memory == 48 * 1024
    assert [seen["num_stages"] for seen in compiler.calls] == [4, 3]
    compiler.stage = 48 * 1024 + 1
    with pytest.raises(EngineError, match="needs 49153 bytes of shared memory, a plugin may have 49152"):
        compile_kernel(node[0], call, launch)


def test_a_launch_that_does_not_fit_the_kernel_is_refused() -> None:
    node = norm()
    call = call_of(node)
    launch = choose_launch(node[0], call)

    with pytest.raises(EngineError, match="passes 5 tensors and 6 numbers, but its kernel takes 5 and 7"):
        compile_kernel(node[0], call, replace(launch, scalars=launch.scalars[1:]))
    with pytest.raises(EngineError, match="passes 4 tensors"):
        compile_kernel(node[0], replace(call, shapes=dict(list(call.shapes.items())[1:])), launch)
    with pytest.raises(ValueError, match="of which .* are constexprs; got constexprs"):
        compile_kernel(node[0], call, replace(launch, constants={}))


def test_the_hash_is_that_of_code_tables_and_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = kernel_hash()
    assert re.fullmatch("[0-9a-f]{64}", own)
    assert own == kernel_hash()

    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "kernel.py").write_text("1")
    monkeypatch.setattr(plugins, "__file__", str(tmp_path / "plugins.py"))
    seen = [own, kernel_hash()]
    (tmp_path / "op" / "kernel.pyc").write_text("not read")
    assert kernel_hash() == seen[-1]
    (tmp_path / "op" / "kernel.py").write_text("2")
    seen.append(kernel_hash())
    (tmp_path / "op.json").write_text("2")
    seen.append(kernel_hash())
    (tmp_path / "op.json").rename(tmp_path / "po.json")
    seen.append(kernel_hash())
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="0"))
    seen.append(kernel_hash())
    assert len(set(seen)) == len(seen)

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailableError, match="pip install triton"):
        kernel_hash()


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("residual_mix/kernel.py", True),
        ("residual_mix/plugin.py", True),
        ("tuning/residual_mix.json", True),
        ("device.py", True),
        ("tuning.py", True),
        ("aot.py", True),
        ("plugins.py", True),
        ("spec.py", False),
        ("check.py", False),
    ],
)
def test_the_hash_counts_what_shapes_a_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str, counts: bool
) -> None:
    copy = shutil.copytree(Path(plugins.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(plugins, "__file__", str(copy / "plugins.py"))
    before = kernel_hash()

    with (copy / changed).open("a") as file:
        file.write("\n")

    assert (kernel_hash() != before) is counts


def test_what_cannot_be_registered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("tensorrt_old")
    old.__version__ = "10.8.0"  # type: ignore[attr-defined]

    with pytest.raises(EngineError, match="no plugin icexport::other; there are: icexport::dual_projection"):
        register(old, ["icexport::other"])
    with pytest.raises(BackendUnavailableError, match=r"tensorrt_old 10.8.0 .* cannot be imported.*10\.9 or later"):
        register(old, ["icexport::residual_mix"])
    monkeypatch.setitem(sys.modules, "tensorrt_old", old)
    monkeypatch.setitem(sys.modules, "tensorrt_old.plugin", types.ModuleType("tensorrt_old.plugin"))
    with pytest.raises(BackendUnavailableError, match="no tensorrt.plugin.aot_impl"):
        register(old, ["icexport::residual_mix"])


FREE = [
    ("fp16", projection(-1, 1280, 480, 16, 16)),
    ("fp32", norm(-1)),
    ("fp16", norm(-1, rows=-1)),
    ("bf16", norm(2, (8, 12))),
    ("fp16", mix(-1)),
    ("fp32", mix(2, (8, 12), normalise=False)),
]


@pytest.mark.tensorrt
@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_bindings_take_the_plugins(version: str, tmp_path: Path) -> None:
    nodes = [
        {"name": name, "type": kind, "shapes": shapes, "attributes": attributes}
        for kind, (name, shapes, attributes) in FREE
    ]
    command = [sys.executable, "-m", "tests.engines.kernels.plugin_flow", json.dumps(nodes)]
    done = subprocess.run(
        command, env=environment(version, tmp_path), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])

    assert result["version"] == version
    for found, (kind, (name, shapes, attributes)) in zip(result["nodes"], FREE, strict=True):
        dtype = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        asked = {key: tuple(None if size < 0 else size for size in shape) for key, shape in shapes.items()}
        free = next(iter(shapes.values()))[0] < 0
        usual, real = (2, 3) if free else (2, 2)
        expected = choose_launch(name, Call(asked, attributes, real, usual, dtype, 90))
        at_run_time = {key: tuple(real if size < 0 else size for size in shape) for key, shape in shapes.items()}
        assert found["shape"] == list(plugins._definition(name).output_shape(at_run_time, attributes))
        assert found["launch"] == {
            "grid_x": expected.grid[0],
            "grid_y": expected.grid[1],
            "grid_z": 1,
            "block_x": 32 * expected.config.num_warps,
            "block_y": 1,
            "block_z": 1,
            "shared_mem": 1024,
        }
        assert found["scalars"] == list(expected.scalars)
        assert found["kernel"] == [f"{name}_{dtype}_90", "// PTX"]
        assert found["constants"].keys() == expected.constants.keys()
        assert all(math.isclose(found["constants"][key], value) for key, value in expected.constants.items())
        assert all(found["types"])
        assert all(found["formats"])
