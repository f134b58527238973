"""Prompts, and simple pictures whose edges the reference model shall follow."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

PROMPTS = ("a red heart", "a green tree", "a blue book", "a yellow star")


def drawing(index: int) -> Image.Image:
    """A simple shape on white, drawn large and made small as an icon is."""
    picture = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(picture)
    if index == 0:
        pen.polygon(
            [(128, 230), (30, 120), (30, 70), (80, 35), (128, 75), (176, 35), (226, 70), (226, 120)], fill="red"
        )
    elif index == 1:
        pen.rectangle((110, 160, 146, 240), fill="brown")
        pen.polygon([(128, 15), (40, 165), (216, 165)], fill="green")
    elif index == 2:
        pen.rectangle((50, 30, 206, 226), fill="blue")
        pen.rectangle((80, 60, 176, 100), fill="white")
    else:
        points = [(128, 15), (158, 95), (245, 98), (176, 150), (200, 235), (128, 185)]
        pen.polygon([*points, (56, 235), (80, 150), (11, 98), (98, 95)], fill="gold")
    return picture.resize((64, 64), Image.Resampling.LANCZOS)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
