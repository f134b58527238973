from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from icexport.models.fused_probe import FusedProbe
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.parity.compare import FACTOR, relative_error

TIME = 12
DIMS = (48, 32, 24)  # the second is projection_dim: an identity shortcut


def probe_of(**changes: Any) -> InnerControlProbe:
    options = {"projection_dim": 32, "num_groups": 4, "head_dims": (8, 4), "time_embed_dim": TIME, **changes}
    torch.manual_seed(3)
    probe = InnerControlProbe(ProbeConfig(dims=DIMS, **options)).eval()
    with torch.no_grad():
        for parameter in probe.parameters():  # so that no norm is an identity and no mixing weight a plain mean
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return probe


def inputs_of(batch: int, height: int = 8, width: int = 12, times: int = 1) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(batch)
    taps = [
        torch.randn(batch, dim, height // scale, width // scale, generator=generator)
        for dim, scale in zip(DIMS, (4, 2, 1), strict=True)
    ]
    return taps, torch.randn(times, TIME, generator=generator)


CONFIGS = {
    "usual": {},
    "no time": {"time_embed_dim": None},
    "time of the file": {"time_embed_dim": None, "unused_time_embed_dim": TIME},
    "twice as large": {"output_scale": 2},
    "no tanh": {"head_tanh": False},
    "one group": {"num_groups": 1},
    "groups of one": {"num_groups": 8},
    "one output": {"out_channels": 1, "head_dims": (4,)},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_equals_the_plain_probe(changes: dict[str, Any]) -> None:
    probe = probe_of(**changes)
    taps, time = inputs_of(2)

    expected, found = probe(taps, time), FusedProbe(probe)(taps, time)

    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (12, 4)], ids=str)
@pytest.mark.parametrize("shared_time", [True, False])
@torch.no_grad()
def test_batches_and_sizes(batch: int, size: tuple[int, int], shared_time: bool) -> None:
    probe = probe_of()
    taps, time = inputs_of(batch, *size, times=1 if shared_time else batch)

    expected, found = probe(taps, time), FusedProbe(probe)(taps, time)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_half_precision_is_no_worse() -> None:
    taps, time = inputs_of(3)
    exact = probe_of().double()([tap.double() for tap in taps], time.double())
    half = probe_of().half()
    arguments = [tap.half() for tap in taps], time.half()

    plain, fused = (relative_error(module(*arguments), exact) for module in (half, FusedProbe(half)))

    assert 1e-5 < plain < 1e-2
    assert fused < FACTOR * plain


def test_the_parameters_are_the_same_ones() -> None:
    probe = probe_of()
    taps, time = inputs_of(1)
    fused = FusedProbe(probe)
    before = fused(taps, time)

    assert {id(p) for p in fused.parameters()} == {id(p) for p in probe.parameters()}
    with torch.no_grad():
        probe.mixing_weights.copy_(torch.tensor([3.0, 0.0, -1.0]))
    assert not torch.allclose(fused(taps, time), before)
    torch.testing.assert_close(fused(taps, time), probe(taps, time))


def test_wrong_taps_are_refused() -> None:
    taps, time = inputs_of(1)
    fused = FusedProbe(probe_of())

    with pytest.raises(ValueError, match="zip"):
        fused(taps[:2], time)
    with pytest.raises(ValueError, match="expected"):
        fused(taps[::-1], time)


@torch.no_grad()
def test_compiles_in_one_piece() -> None:
    probe = probe_of()
    taps, time = inputs_of(2)

    found = torch.compile(FusedProbe(probe), backend="aot_eager", fullgraph=True)(taps, time)

    torch.testing.assert_close(found, probe(taps, time))


def test_exports_with_a_free_batch() -> None:
    probe = probe_of()
    batch = Dim("batch", min=1, max=4)

    program = torch.export.export(FusedProbe(probe), inputs_of(2), dynamic_shapes=([{0: batch}] * 3, None))

    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("icexport" in call for call in calls) == 5 * len(DIMS)
    assert not any(call.startswith(("aten.group_norm", "aten.upsample")) for call in calls)
    with torch.no_grad():
        for size in (1, 3):
            taps, time = inputs_of(size)
            torch.testing.assert_close(program.module()(taps, time), probe(taps, time))
