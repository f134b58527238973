from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.icons import IconSet, _iconify_items, _on_white, caption, color_words, is_held_out, manifest


def square(color: tuple[int, int, int]) -> np.ndarray:
    image = np.full((64, 64, 3), 255, np.uint8)
    image[16:48, 16:48] = color
    return image


@pytest.mark.parametrize(
    ("color", "word"),
    [
        ((220, 30, 40), "red"),
        ((250, 150, 20), "orange"),
        ((250, 220, 40), "yellow"),
        ((40, 180, 60), "green"),
        ((30, 80, 220), "blue"),
        ((140, 50, 200), "purple"),
        ((120, 70, 20), "brown"),
        ((20, 20, 20), "black"),
        ((150, 150, 150), "gray"),
    ],
)
def test_color_words(color: tuple[int, int, int], word: str) -> None:
    assert color_words(square(color)) == word


def test_color_words_are_ordered_by_share_and_blank_has_none() -> None:
    image = square((220, 30, 40))
    image[16:26, 16:48] = (40, 180, 60)
    assert color_words(image) == "red,green"
    assert color_words(np.full((64, 64, 3), 255, np.uint8)) == ""


def test_held_out_pairs_never_change() -> None:
    # These are promises: a change here would put trained pictures into the held-out set.
    names = ("red apple", "lemon", "hot dog", "key", "dolphin", "tulip")
    assert [name for name in names if is_held_out(name, "flat")] == ["tulip"]
    share = np.mean([is_held_out(f"concept {i}", "3d") for i in range(4000)])
    assert 0.04 < share < 0.06


def test_captions_hold_the_name_and_do_not_repeat_its_colour() -> None:
    rng = np.random.default_rng(0)
    texts = {caption("red apple", "flat", "red,green", rng) for _ in range(300)}
    assert all("red apple" in t and "red red" not in t for t in texts)
    assert {"red apple", "a red apple", "green red apple, flat icon"} <= texts


def test_skin_tones_flags_and_hidden_icons_are_left_out(tmp_path: Path) -> None:
    names = ["wave", "wave-light", "wave-medium-dark", "traffic-light", "france", "old"]
    icons = {name: {"body": "<path/>"} for name in names} | {"hand-dark-skin-tone": {"body": "<path/>"}}
    icons["old"]["hidden"] = True  # type: ignore[assignment]
    (tmp_path / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
    items = _iconify_items(tmp_path, frozenset({"france"}))
    assert [name for name, _ in items] == ["traffic light", "wave"]
    assert 'viewBox="0 0 32 32"' in items[0][1]


def test_pictures_are_centred_on_white() -> None:
    image = _on_white(Image.new("RGBA", (20, 40), (255, 0, 0, 255)), 64)
    assert image.shape == (64, 64, 3)
    assert (image[:, :8] == 255).all()
    assert (_on_white(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), 64) == 255).all()


def test_manifest_changes_with_a_pixel() -> None:
    def icons(value: int) -> IconSet:
        images = np.full((2, 4, 4, 3), value, np.uint8)
        words = np.array(["a", "b"])
        return IconSet(images, words, np.array(["flat", "3d"]), words, np.array([False, True]))

    first, second = manifest(icons(1)), manifest(icons(2))
    assert first["pictures"] == 2
    assert first["held_out"] == 1
    assert first["sha256"] != second["sha256"]
