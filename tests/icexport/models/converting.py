"""Files to convert: align models as the authors save them, and hostile ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icexport.models.convert import ConvertReport, convert

SD15_ATTN = [1280] * 3 + [640] * 3 + [320] * 3
SMALL = [48, 48, 32]
TIME = 24
Payload = dict[str, Any]


def official_state(
    dims: list[int], projection: int, time: int, sequential: bool = False, out_channels: int = 3
) -> dict[str, Tensor]:
    """Tensors under the documented names of the official align model."""
    width = projection // 4
    shapes: dict[str, tuple[int, ...]] = {"mixing_weights": (len(dims),)}
    for index, dim in enumerate(dims):
        prefix = f"bottleneck_layers.{index}." + ("0." if sequential else "")
        convolutions = {
            "shortcut": (projection, dim, 1, 1),
            "conv1": (width, dim, 1, 1),
            "conv2": (width, width, 3, 3),
            "conv3": (projection, width, 1, 1),
        }
        for name, shape in convolutions.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.norm.weight"] = shapes[f"{prefix}{name}.norm.bias"] = shape[:1]
        shapes[f"{prefix}emb_layers.weight"] = (width, time)
        shapes[f"{prefix}emb_layers.bias"] = (width,)
    for index, shape in {0: (128, projection, 3, 3), 2: (32, 128, 3, 3), 4: (out_channels, 32, 1, 1)}.items():
        shapes[f"output_head.{index}.weight"] = shape
        shapes[f"output_head.{index}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def payload(sequential: bool = False, out_channels: int = 3) -> Payload:
    return {
        "step": 5000,
        "config": {
            "projection_dim": 64,
            "dims": list(SMALL),
            "save_timestep": [0],
            "num_timesteps": 1000,
            "aggregation_kwargs": {
                "use_output_head": True,
                "output_head_channels": out_channels,
                "bottleneck_sequential": sequential,
                "num_norm_groups": 8,
            },
            "dataset_args": {"control_range": [-1, 1]},
        },
        "aggregation_network": official_state(SMALL, 64, TIME, sequential, out_channels),
    }


def convert_payload(tmp_path: Path, content: object, **options: Any) -> ConvertReport:
    torch.save(content, tmp_path / "align.pt")
    return convert(tmp_path / "align.pt", tmp_path / "probe", **{"cond": "hed", "taps": "attn", **options})


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


class RunsCode:
    """Creates a file when it is unpickled by an unsafe loader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)
