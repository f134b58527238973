"""Small data sets on disk. Picture ``i`` is a gradient that no other picture has."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = 16


def picture(number: int, width: int = 24, height: int = 20) -> Image.Image:
    """Asymmetric on both axes, so that every cut and mirroring shows."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 9, y * 11, np.full_like(x, 10 * number)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def folder(
    path: Path, count: int, broken: Iterable[int] = (), silent: Iterable[int] = (), control: bool = False
) -> Path:
    """A picture folder with ``count`` pictures; some cut short, some without caption."""
    path.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        name = f"{number:03d}.png"
        content = png(picture(number))
        (path / name).write_bytes(content[:60] if number in broken else content)
        rows.append({"file_name": name, "text": None if number in silent else f"caption {number}"})
        if control:
            (path / "maps").mkdir(exist_ok=True)
            picture(number).save(path / "maps" / name)
            rows[-1]["edges_file_name"] = f"maps/{name}"
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(number: int, broken: bool = False) -> dict[str, bytes]:
    content = png(picture(number))
    return {"png": content[:60] if broken else content, "txt": f"caption {number}".encode()}


def shard(path: Path, samples: Mapping[str, Mapping[str, bytes]], compress: str = "") -> Path:
    """A tar file of ``{key: {ending: content}}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{compress}") as archive:
        for key, fields in samples.items():
            for ending, content in fields.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def shards(path: Path, sizes: Iterable[int], broken: Iterable[int] = ()) -> Path:
    """Shards ``0.tar``, ``1.tar`` ... of the given numbers of samples, numbered through."""
    number = 0
    for index, size in enumerate(sizes):
        numbers = range(number, number + size)
        shard(path / f"{index}.tar", {f"{n:03d}": sample(n, n in broken) for n in numbers})
        number += size
    return path


def tokenize(captions: list[str]) -> torch.Tensor:
    """Letters as numbers, 12 of them."""
    return torch.tensor([[ord(letter) for letter in caption.ljust(12)[:12]] for caption in captions])
