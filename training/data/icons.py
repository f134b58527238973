"""The icon set that the reference model is trained on: about 8,000 named pictures in five styles.

The pictures come from five emoji sets published on npm under MIT or Apache-2.0 (``SOURCES``). They are fetched with
``npm pack``, rendered at 64 px on white, and kept in one ``.npz`` outside the repository; the repository holds only
this code and ``manifest()``'s output. A concept (``red apple``) appears in up to five styles, so that holding out
(concept, style) pairs measures generalisation and not memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.05
"""Share of the (concept, style) pairs that no training stage ever sees."""


@dataclass(frozen=True)
class IconSource:
    """One npm package of pictures. ``style`` is the word that captions use for its look."""

    package: str
    version: str
    style: str
    licence: str


SOURCES = (
    IconSource("@iconify-json/noto", "1.2.9", "shaded", "Apache-2.0"),
    IconSource("@iconify-json/noto-v1", "1.2.5", "blob", "Apache-2.0"),
    IconSource("@iconify-json/fluent-emoji", "1.2.7", "glossy", "MIT"),
    IconSource("@iconify-json/fluent-emoji-flat", "1.2.6", "flat", "MIT"),
    IconSource("@lobehub/fluent-emoji-3d", "1.1.0", "3d", "MIT"),
)
NAMES = IconSource("emojibase-data", "17.0.0", "", "MIT")

_SKIN_SUFFIX = re.compile(r"-(medium-light|medium-dark|light|medium|dark)$")


@dataclass(frozen=True)
class IconSet:
    """Rendered pictures with their captions' parts.

    Attributes:
        images: uint8 ``[N, H, W, 3]``, RGB on white.
        names: concept of each picture, lower case with spaces.
        styles: style word of each picture.
        colors: colour words of each picture, most frequent first, joined by a comma; may be empty.
        held_out: bool ``[N]``; True where the (concept, style) pair must not be trained on.
    """

    images: np.ndarray
    names: np.ndarray
    styles: np.ndarray
    colors: np.ndarray
    held_out: np.ndarray

    def subset(self, mask: np.ndarray) -> IconSet:
        """Return the pictures where ``mask`` (bool ``[N]`` or indices) selects."""
        return IconSet(*(getattr(self, f)[mask] for f in ("images", "names", "styles", "colors", "held_out")))

    def __len__(self) -> int:
        return len(self.names)


def is_held_out(name: str, style: str) -> bool:
    """Tell whether the pair belongs to the fixed held-out set: a hash decides, whatever the order or version."""
    digest = hashlib.sha256(f"{name}|{style}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def caption(name: str, style: str, colors: str, rng: np.random.Generator) -> str:
    """Return a caption in one of the forms that a person might type: with or without article, colours and style."""
    words = [c for c in colors.split(",") if c and c not in name.split()]
    form = rng.random()
    text = name
    if words and form < 0.35:
        text = f"{words[0]} {name}"
    elif words and form < 0.8:
        text = f"{name}, {' and '.join(words)}"
    if rng.random() < 0.4:
        text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    if rng.random() < 0.5:
        text = f"{text}, {style} icon"
    return text


_HUES = ((9, "red"), (20, "orange"), (34, "yellow"), (85, "green"), (100, "cyan"), (130, "blue"), (150, "purple"),
         (169, "pink"), (180, "red"))  # fmt: skip


def color_words(image: np.ndarray, limit: int = 3, share: float = 0.14) -> str:
    """Return the names of the main colours of a picture's foreground, most frequent first, joined by a comma.

    Args:
        image: uint8 ``[H, W, 3]`` RGB on a white background.
        limit: at most this many words.
        share: a colour counts from this share of the foreground on.
    """
    foreground = np.abs(image.astype(np.int16) - 255).max(axis=-1) > 12
    if foreground.sum() < 20:
        return ""
    hue, saturation, value = (c[foreground] for c in np.moveaxis(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), -1, 0))
    edges = np.array([edge for edge, _ in _HUES])
    words = np.array([word for _, word in _HUES], dtype="<U6")[np.searchsorted(edges, hue, side="right").clip(0, 8)]
    words[(words == "orange") & (value < 165)] = "brown"
    words[(words == "red") & (saturation < 140) & (value > 190)] = "pink"
    gray = saturation < 38
    words[gray] = np.select([value[gray] < 80, value[gray] < 215], ["black", "gray"], "white")
    words[value < 55] = "black"
    found, counts = np.unique(words, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return ",".join(found[i] for i in order[:limit] if counts[i] >= share * foreground.sum())


def prepare(cache: Path, size: int = 64, workers: int = 2) -> IconSet:
    """Load the icon set from ``cache``, fetching and rendering it first where it is missing.

    Needs ``npm`` on the PATH and the package ``resvg-py`` for the first call.
    """
    path = cache / f"icons-{size}.npz"
    if not path.exists():
        rendered = list(_render_all(cache, size, workers))
        np.savez_compressed(
            path,
            images=np.stack([r[2] for r in rendered]),
            names=np.array([r[0] for r in rendered]),
            styles=np.array([r[1] for r in rendered]),
            colors=np.array([color_words(r[2]) for r in rendered]),
        )
    with np.load(path) as data:
        held_out = np.array([is_held_out(n, s) for n, s in zip(data["names"], data["styles"], strict=True)])
        return IconSet(data["images"], data["names"], data["styles"], data["colors"], held_out)


def manifest(icons: IconSet) -> dict[str, object]:
    """Return what the model card records of the data: sources, licences, counts and a hash of every pixel and name."""
    digest = hashlib.sha256(icons.images.tobytes())
    digest.update("\n".join(f"{n}|{s}" for n, s in zip(icons.names, icons.styles, strict=True)).encode())
    counts = {s.style: int((icons.styles == s.style).sum()) for s in SOURCES}
    return {
        "sources": [asdict(s) | {"pictures": counts[s.style]} for s in SOURCES],
        "names": asdict(NAMES),
        "pictures": len(icons),
        "concepts": len(set(icons.names.tolist())),
        "held_out": int(icons.held_out.sum()),
        "size": icons.images.shape[1],
        "sha256": digest.hexdigest(),
    }


def _render_all(cache: Path, size: int, workers: int) -> Iterator[tuple[str, str, np.ndarray]]:
    cache.mkdir(parents=True, exist_ok=True)
    flags = _flag_names(_fetch(SOURCES[0], cache))
    with ProcessPoolExecutor(workers) as pool:
        for source in SOURCES:
            package = _fetch(source, cache)
            if source.package.startswith("@iconify-json/"):
                names, drawings = zip(*_iconify_items(package, flags), strict=True)
                images = pool.map(partial(_render_svg, size=size), drawings, chunksize=64)
            else:
                names, paths = zip(*_webp_items(package, _fetch(NAMES, cache)), strict=True)
                images = pool.map(partial(_load_webp, size=size), paths, chunksize=64)
            for name, image in zip(names, images, strict=True):
                yield name, source.style, image
            logger.info("%s: %d pictures", source.package, len(names))


def _fetch(source: IconSource, cache: Path) -> Path:
    """Return the folder of the unpacked npm package, downloaded with ``npm pack`` if it is not there yet."""
    stem = source.package.lstrip("@").replace("/", "-") + f"-{source.version}"
    folder = cache / stem
    if not folder.exists():
        archive = cache / f"{stem}.tgz"
        if not archive.exists():
            pack = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
            subprocess.run(pack, cwd=cache, check=True)  # noqa: S603  the names are constants of this module
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def _flag_names(package: Path) -> frozenset[str]:
    return frozenset(json.loads((package / "metadata.json").read_text())["categories"]["Flags"])


def _is_skin_tone(name: str, names: set[str]) -> bool:
    """Find ``…-skin-tone`` in any position, or fluent's bare ``-light``/``-medium``/``-dark`` by a plain twin."""
    return "skin-tone" in name or (bool(_SKIN_SUFFIX.search(name)) and _SKIN_SUFFIX.sub("", name) in names)


def _iconify_items(package: Path, flags: frozenset[str]) -> list[tuple[str, str]]:
    data = json.loads((package / "icons.json").read_text())
    icons, names = data["icons"], set(data["icons"])
    items = []
    for key in sorted(icons):
        icon = icons[key]
        if icon.get("hidden") or _is_skin_tone(key, names) or key in flags or key.startswith("flag-for-"):
            continue
        width, height = (icon.get(k, data.get(k, 16)) for k in ("width", "height"))
        body = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        items.append((key.replace("-", " "), body))
    return items


def _webp_items(package: Path, names: Path) -> list[tuple[str, Path]]:
    labels = {e["hexcode"].lower(): e["label"] for e in json.loads((names / "en" / "data.json").read_text())}
    labels |= {code.replace("-fe0f", ""): label for code, label in labels.items()}
    items = []
    for path in sorted((package / "assets").glob("*.webp")):
        label = labels.get(path.stem, labels.get(path.stem.replace("-fe0f", "")))
        if label and not label.startswith("flag:"):
            items.append((re.sub(r"[^a-z0-9]+", " ", label.lower()).strip(), path))
    return items


def _on_white(picture: Image.Image, size: int) -> np.ndarray:
    """Centre a picture on a white square of ``size``, keeping its aspect."""
    picture = picture.convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def _render_svg(svg: str, size: int) -> np.ndarray:
    import resvg_py  # not a dependency of anything but this first rendering

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return _on_white(Image.open(io.BytesIO(bytes(png))), size)


def _load_webp(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as picture:
        return _on_white(picture, size)
