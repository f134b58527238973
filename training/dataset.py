"""What the diffusion stages train on: latents, control maps and tokens of the icons, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from training.data.icons import IconSet, caption, color_words
from training.loop import world
from training.vae import encode_shared

CANNY_THRESHOLDS = (60, 140)
CAPTIONS = 6
"""Captions per picture, drawn once."""

_COLORS = frozenset(
    ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black", "gray", "white"]
)
_MIRROR = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class DiffusionSet:
    """Training pictures in the form that the UNet sees. N pictures, augmented ones included.

    Attributes:
        latents: float32 ``[N,4,h,w]``, scaled to unit variance.
        control_maps: uint8 ``[N,H,W]``, canny edges, 0 or 255.
        tokens: int32 ``[N,CAPTIONS,77]``.
        empty_tokens: int32 ``[77]``, the empty prompt.
    """

    latents: torch.Tensor
    control_maps: torch.Tensor
    tokens: torch.Tensor
    empty_tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


def turn_hue(image: np.ndarray, degrees: int) -> np.ndarray:
    """``image`` (uint8 RGB ``[H,W,3]``) with every hue turned by ``degrees``; greys stay as they are."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + degrees // 2) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _variants(icons: IconSet, rng: np.random.Generator) -> list[tuple[np.ndarray, str, str, str, bool]]:
    """(picture, name, style, colours, recoloured) of every picture, mirrored ones and recoloured ones."""
    rows = []
    for image, name, style, colors in zip(icons.images, icons.names, icons.styles, icons.colors, strict=True):
        name, style = str(name), str(style)
        mirrored_name = " ".join(_MIRROR.get(w, w) for w in name.split())
        rows.append((image, name, style, str(colors), False))
        rows.append((image[:, ::-1], mirrored_name, style, str(colors), False))
        # A recoloured picture teaches what a colour word means; its name must not contradict the new colour.
        plain = " ".join(w for w in name.split() if w not in _COLORS)
        turned = turn_hue(image, int(rng.integers(40, 321)))
        words = color_words(turned)
        if plain and words:
            rows.append((turned, plain, style, words, True))
    return rows


def prepare(icons: IconSet, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, cache: Path) -> DiffusionSet:
    """``build``, or what an earlier run of the same training built."""
    if not cache.exists():
        data = build(icons, vae, tokenizer, seed)
        if world()[0] == 0:
            save_file({name: tensor.contiguous() for name, tensor in vars(data).items()}, cache)
        return data
    return DiffusionSet(**load_file(cache))


def build(icons: IconSet, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int) -> DiffusionSet:
    """Encode, outline and caption ``icons`` with their mirrored and recoloured copies."""
    rng = np.random.default_rng(seed)
    rows = _variants(icons, rng)
    texts = []
    for _, name, style, colors, recoloured in rows:
        shown = colors.split(",")
        for _ in range(CAPTIONS):
            if recoloured:
                text = f"{shown[0]} {name}" if rng.random() < 0.5 else f"{name}, {' and '.join(shown)}"
                texts.append(f"{text}, {style} icon" if rng.random() < 0.5 else text)
            else:
                texts.append(caption(name, style, colors, rng))
    images = np.stack([row[0] for row in rows])
    return DiffusionSet(
        latents=encode_shared(vae, torch.from_numpy(images).permute(0, 3, 1, 2)),
        control_maps=torch.from_numpy(
            np.stack([cv2.Canny(np.ascontiguousarray(i), *CANNY_THRESHOLDS) for i in images])
        ),
        tokens=tokenize(tokenizer, texts).view(len(rows), CAPTIONS, -1),
        empty_tokens=tokenize(tokenizer, [""])[0],
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids int32 ``[len(texts),77]``."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.as_tensor(ids, dtype=torch.int32)
