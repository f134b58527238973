"""Procedural scenes with exact depth: what depth is trained and judged on where no depth network can be had.

A room with a floor and a wall, and two to five objects standing on the floor. On a floor seen in perspective, inverse
depth grows linearly from the horizon down, so the line where an object touches the floor says how near it is, and its
size does too. Colours and textures say nothing about depth: a network that reads it has to read the geometry.
Scene ``i`` is a function of ``i`` alone; held-out scenes have indices from `HELD_OUT` on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from icexport.host.files import whole

SIZE = 64
"""Height and width of a scene, in pixels."""

HELD_OUT = 1 << 30
"""First index of the scenes that nothing is trained on."""

SUPERSAMPLING = 4

COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 60),
    "green": (60, 160, 70),
    "cyan": (60, 190, 200),
    "blue": (50, 90, 200),
    "purple": (130, 70, 180),
    "gray": (130, 130, 130),
}
SHAPES = ("ball", "box", "cone", "ring", "pillar")
TEXTURES = ("plain", "striped", "dotted")

FARTHEST, NEAREST = 0.15, 0.85
"""Inverse depth of where objects may stand: 0 at the horizon, 1 at the lower border of the picture."""

SLOPE = 0.12
"""How far an object's inverse depth rises above that of its outline, at most."""


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: uint8 ``[64,64,3]``, RGB.
        depth: float32 ``[64,64]`` in [0,1], inverse depth as depth networks give it: 1 nearest, 0 farthest.
        caption: what is in it, the nearest object first.
    """

    image: np.ndarray
    depth: np.ndarray
    caption: str


def render(index: int) -> Scene:
    """Draw scene ``index`` (0 to 2**31)."""
    rng = np.random.default_rng((0x5CE, index))
    side = SIZE * SUPERSAMPLING
    horizon = int(side * rng.uniform(0.25, 0.5))
    wall, floor = (str(name) for name in rng.choice(list(COLORS), 2, replace=False))
    picture, depth = _room(side, horizon, wall, floor, rng)
    count = int(rng.integers(2, 6))
    words = []
    for nearness in np.sort(rng.uniform(FARTHEST, NEAREST, count)):
        shape, color, texture = (str(rng.choice(choices)) for choices in (SHAPES, list(COLORS), TEXTURES))
        foot = horizon + nearness * (side - horizon)
        height = side * (0.1 + 0.55 * nearness) * rng.uniform(0.8, 1.2)
        width = height * {"pillar": 0.35, "cone": 0.8}.get(shape, 1.0)
        center = rng.uniform(0.08, 0.92) * side
        _shadow(picture, center, foot, width)
        mask, bulge = _outline(shape, side, center, foot, width, height)
        paint = _texture(texture, np.array(COLORS[color], np.float32), side, int(side * rng.uniform(0.12, 0.18)))
        shade = 0.7 + 0.4 * bulge[..., None]
        picture[mask] = np.clip(paint * shade, 0, 255)[mask]
        depth[mask] = (nearness + SLOPE * bulge)[mask]
        words.append(f"{color} {shape}" if texture == "plain" else f"{texture} {color} {shape}")
    image = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    exact = depth[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    low, high = exact.min(), exact.max()
    caption = f"{_listed(words[::-1][:3])} in {_with_article(wall)} room with {_with_article(floor)} floor"
    return Scene(image.round().astype(np.uint8), ((exact - low) / (high - low)).astype(np.float32), caption)


@dataclass(frozen=True)
class SceneSet:
    """Several scenes.

    Attributes:
        images: uint8 ``[N,64,64,3]``, RGB.
        depth: uint8 ``[N,64,64]``, inverse depth, 255 nearest.
        captions: one caption for each scene.
    """

    images: np.ndarray
    depth: np.ndarray
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def render_many(indices: Iterable[int], workers: int = 1) -> SceneSet:
    """Render several scenes, in ``workers`` processes."""
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            scenes = list(pool.map(render, indices, chunksize=64))
    else:
        scenes = [render(index) for index in indices]
    depth = np.stack([s.depth for s in scenes])
    return SceneSet(np.stack([s.image for s in scenes]), (255 * depth).round().astype(np.uint8),
                    [s.caption for s in scenes])  # fmt: skip


def prepare(cache: Path, count: int, workers: int = 2) -> SceneSet:
    """Return scenes 0 to ``count - 1``, from ``cache`` where an earlier call left them."""
    path = cache / f"scenes-{count}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        found = render_many(range(count), workers)
        with whole(path) as partial:  # several processes may prepare at once
            np.savez_compressed(partial, images=found.images, depth=found.depth, captions=np.array(found.captions))
    with np.load(path) as data:
        return SceneSet(data["images"], data["depth"], data["captions"].tolist())


def _room(side: int, horizon: int, wall: str, floor: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw wall and floor ``[side,side,3]`` in a slight gradient of light, and their inverse depth ``[side,side]``."""
    rows = np.arange(side, dtype=np.float32)
    picture = np.empty((side, side, 3), np.float32)
    # Pale, so that objects stand out; the light changes across the room, not with depth.
    pale = {part: 0.55 * 255 + 0.45 * np.array(COLORS[name], np.float32) for part, name in
            (("wall", wall), ("floor", floor))}  # fmt: skip
    picture[:horizon], picture[horizon:] = pale["wall"], 0.85 * pale["floor"]
    light = 1 + rng.uniform(-0.15, 0.15) * np.linspace(-1, 1, side, dtype=np.float32)
    picture = np.clip(picture * light[None, :, None], 0, 255)
    nearness = np.clip((rows - horizon) / (side - horizon), 0, 1)
    return picture, np.repeat(nearness[:, None], side, axis=1).astype(np.float32)


def _shadow(picture: np.ndarray, center: float, foot: float, width: float) -> None:
    """Darken the floor where an object touches it."""
    mask = np.zeros(picture.shape[:2], np.uint8)
    axes = (max(1, int(0.6 * width)), max(1, int(0.12 * width)))
    cv2.ellipse(mask, (int(center), int(foot)), axes, 0, 0, 360, 1, -1)
    picture[mask.astype(bool)] *= 0.7


def _outline(
    shape: str, side: int, center: float, foot: float, width: float, height: float
) -> tuple[np.ndarray, np.ndarray]:
    """Find where the object is (bool ``[side,side]``) and how far its surface bulges towards the viewer, in [0,1]."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    u, v = (x - center) / (width / 2), (foot - y) / height  # u in [-1,1] across, v in [0,1] upwards
    radius = np.sqrt(u**2 + (2 * v - 1) ** 2)
    inside = (np.abs(u) <= 1) & (v >= 0) & (v <= 1)
    round_bulge = np.sqrt(np.clip(1 - radius**2, 0, 1))
    across = np.sqrt(np.clip(1 - u**2, 0, 1))
    masks: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "ball": lambda: (radius <= 1, round_bulge),
        "box": lambda: (inside, np.clip(0.5 + 0.5 * u, 0, 1)),
        "cone": lambda: (inside & (np.abs(u) <= 1 - v), across * (1 - v)),
        "ring": lambda: ((radius <= 1) & (radius >= 0.55), np.clip(1 - np.abs(radius - 0.78) / 0.22, 0, 1)),
        "pillar": lambda: (inside, across),
    }
    return masks[shape]()


def _texture(kind: str, color: np.ndarray, side: int, period: int) -> np.ndarray:
    """Make the object's paint ``[side,side,3]``: one colour, or with stripes or dots every ``period`` px."""
    paint = np.broadcast_to(color, (side, side, 3)).copy()
    y, x = np.mgrid[0:side, 0:side]
    if kind == "striped":
        paint[(x + y) // period % 2 == 0] += 70
    elif kind == "dotted":
        paint[(x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2] += 90
    return paint


def _listed(words: list[str]) -> str:
    """Return words as English lists them, with their articles."""
    named = [_with_article(word) for word in words]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
