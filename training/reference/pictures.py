"""What the reference model's diffusion stages train on: latents and tokens of the pictures, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from icexport.conditions import Condition
from training.data.drawn import Draw
from training.data.icons import IconSet, caption, color_words
from training.data.scenes import SceneSet
from training.reference.autoencoder import encode_shared

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
        images: pictures, uint8 ``[N,3,H,W]``, RGB.
        latents: latents, float32 ``[N,4,h,w]``, scaled to unit variance.
        tokens: token ids, int32 ``[N,CAPTIONS,77]``.
        empty_tokens: token ids of the empty prompt, int32 ``[77]``.
    """

    images: torch.Tensor
    latents: torch.Tensor
    tokens: torch.Tensor
    empty_tokens: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def subset(self, index: torch.Tensor) -> DiffusionSet:
        """Return the pictures that ``index`` (bool ``[N]`` or int) selects."""
        return DiffusionSet(self.images[index], self.latents[index], self.tokens[index], self.empty_tokens)

    def draw(self, batch_size: int, maps: torch.Tensor | None = None) -> Draw:
        """Draw batches as the training tasks take them, with the control maps uint8 ``[N,H,W]`` where given."""

        def batch(generator: torch.Generator) -> dict[str, Any]:
            index = torch.randint(len(self), (batch_size,), generator=generator)
            form = torch.randint(CAPTIONS, (batch_size,), generator=generator)
            found: dict[str, Any] = {
                "pixels": self.images[index].float() / 255,
                "latents": self.latents[index],
                "input_ids": self.tokens[index, form].long(),
                "ids": [f"picture {i}" for i in index.tolist()],
            }
            if maps is not None:
                found["control"] = (maps[index].float() / 255)[:, None].expand(-1, 3, -1, -1)
            return found

        return batch


def turn_hue(image: np.ndarray, degrees: int) -> np.ndarray:
    """Return ``image`` (uint8 RGB ``[H,W,3]``) with every hue turned by ``degrees``; greys stay as they are."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + degrees // 2) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _variants(icons: IconSet, rng: np.random.Generator) -> list[tuple[np.ndarray, str, str, str, bool]]:
    """Return (picture, name, style, colours, recoloured) of every picture, mirrored ones and recoloured ones."""
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


def prepare(cache: Path, build: Callable[[], DiffusionSet]) -> DiffusionSet:
    """Return what ``build`` returns, or what an earlier run of the same training built."""
    if not cache.exists():
        data = build()
        if PartialState().is_main_process:
            save_file({name: tensor.contiguous() for name, tensor in vars(data).items()}, cache)
        return data
    return DiffusionSet(**load_file(cache))


def build(
    icons: IconSet, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, scenes: SceneSet | None = None
) -> DiffusionSet:
    """Encode and caption ``icons`` with their mirrored and recoloured copies, then ``scenes`` with mirrored ones."""
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
    images = [row[0] for row in rows]
    if scenes is not None:
        for image, text in zip(scenes.images, scenes.captions, strict=True):
            images += [image, image[:, ::-1]]
            texts += [text if rng.random() < 0.7 else text.partition(" in ")[0] for _ in range(2 * CAPTIONS)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return DiffusionSet(
        images=pixels,
        latents=encode_shared(vae, pixels),
        tokens=tokenize(tokenizer, texts).view(len(pixels), CAPTIONS, -1),
        empty_tokens=tokenize(tokenizer, [""])[0],
    )


@torch.no_grad()
def control_maps(images: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Return control maps uint8 ``[N,H,W]`` of uint8 pictures ``[N,3,H,W]``."""
    maps = [condition.extract_batch(chunk.float() / 255)[:, 0] for chunk in images.split(64)]
    return (255 * torch.cat(maps)).round().byte()


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return token ids int32 ``[len(texts),77]``."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.as_tensor(ids, dtype=torch.int32)
