"""``icexport generate`` on a tiny bundle: files in, pictures and their texts out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from icexport.bundle.store import Bundle
from icexport.cli import generate
from icexport.conditions.maps import extracted_map
from icexport.fidelity.report import FidelityReport
from icexport.host import pictures
from icexport.runtime.drawing import Drawn
from tests.steps import Told, shown_steps


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide picture of a disc."""
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill="red")
    path = tmp_path_factory.mktemp("pictures") / "apple.png"
    image.save(path)
    return path


@pytest.fixture(scope="module")
def control_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = Image.new("RGB", (16, 16))
    ImageDraw.Draw(image).rectangle((4, 4, 11, 11), outline="white")
    path = tmp_path_factory.mktemp("maps") / "square.png"
    image.save(path)
    return path


def test_splitting_changes_no_picture(icexport, tiny_bundle: Path, apple: Path, tmp_path: Path) -> None:
    args = ("generate", tiny_bundle, "--prompt", "an äpple", "--image", apple, "--steps", "2", "--json")
    run = icexport(*args, "--num-images", "5", "--seed", "7", "--output", tmp_path / "new" / "out.png")
    assert run.exit_code == 0, run.stderr
    assert shown_steps(run.stderr) == ["load the bundle", "draw", "decode and score"]
    document = json.loads(run.stdout)
    paths = [tmp_path / "new" / f"out-{i}.png" for i in range(5)]
    assert [row["picture"] for row in document["pictures"]] == list(map(str, paths))
    assert [row["seed"] for row in document["pictures"]] == [7, 8, 9, 10, 11]
    assert document["fidelity"]["scores"] == [row["score"] for row in document["pictures"]]
    assert [len(step["errors"]) for step in document["fidelity"]["steps"]] == [5, 5]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)

    run = icexport(*args, "--seed", "10", "--output", tmp_path / "one.png")
    alone, among = (np.asarray(Image.open(path), dtype=int) for path in (tmp_path / "one.png", paths[3]))
    assert np.abs(alone - among).max() <= 1
    text = Image.open(tmp_path / "one.png").text
    wanted = {"prompt": "an äpple", "negative_prompt": "", "seed": "10", "steps": "2", "guidance_scale": "7.5"}
    wanted |= {"controlnet_scale": "1.0", "scheduler": "UniPCMultistepScheduler", "condition": "canny"}
    wanted |= {"bundle_key": Bundle(tiny_bundle).manifest.key, "metric": "edge F1"}
    assert text.items() >= wanted.items()
    assert float(text["score"]) == json.loads(run.stdout)["pictures"][0]["score"]
    assert str(tmp_path) not in str(text)


def test_a_ready_map_is_used_as_it_is(icexport, tiny_bundle: Path, control_map: Path, tmp_path: Path) -> None:
    used = tmp_path / "map.png"
    run = icexport(
        *("generate", tiny_bundle, "--prompt", "a", "--control-map", control_map, "--save-control-map", used),
        *("--steps", "1", "--scheduler", "DDIM", "--guidance-scale", "1", "--output", tmp_path / "out.png"),
    )
    assert run.exit_code == 0, run.stderr
    assert np.array_equal(np.asarray(Image.open(used)), np.asarray(Image.open(control_map)))
    assert "edge F1 (higher is better)" in run.stdout
    assert str(tmp_path / "out.png") in run.stdout
    assert Image.open(tmp_path / "out.png").text["scheduler"] == "DDIMScheduler"


def test_denoising_steps_are_counted_over_all_calls() -> None:
    told, pipe = Told(), SimpleNamespace(num_timesteps=3)
    told.expect(2)
    ended = generate._counting(told, 2)
    assert [ended(pipe, i % 3, 0, {"latents": i}) for i in range(6)] == [{"latents": i} for i in range(6)]
    assert told.parts == [("draw", n, 6) for n in range(1, 7)]
    assert told.names == ["draw", "decode and score"]


def test_thresholds_change_the_extraction(tiny_bundle: Path, apple: Path) -> None:
    def edges(**thresholds: float) -> int:
        control = extracted_map(Bundle(tiny_bundle).condition(**thresholds), apple, (16, 16), "crop")
        return int((np.asarray(control) > 0).sum())

    assert edges() > edges(low_threshold=60, high_threshold=1530) == 0


def test_values_that_are_no_numbers_fail_the_check(
    icexport, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, control_map: Path, tmp_path: Path
) -> None:
    def broken(*_args: object, **_options: object) -> Iterator[Drawn]:
        yield Drawn(torch.zeros(1, 3, 16, 16), FidelityReport("canny", "edge F1", "ratio", True, [float("nan")]))

    monkeypatch.setattr("icexport.runtime.drawing.draw_calls", broken)
    args = ("generate", tiny_bundle, "--prompt", "a", "--control-map", control_map, "--output", tmp_path / "out.png")
    run = icexport(*args, "--json")
    assert run.exit_code == 3
    assert json.loads(run.stdout)["fidelity"]["passed"] is False
    assert "NaN" in run.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Give either --image"),
        (("--image", "APPLE", "--control-map", "MAP"), "Give either --image"),
        (("--control-map", "MAP", "--output", "out.jpg"), "Name a .png file"),
        (("--control-map", "MAP", "--save-control-map", "map.bmp"), "Name a .png file"),
        (("--control-map", "MAP", "--low-threshold", "0"), "--low-threshold belongs to the extraction"),
        (("--image", "APPLE", "--low-threshold", "200"), "low_threshold <= high_threshold"),
        (("--control-map", "MAP", "--height", "64"), "--height 64"),
        (("--control-map", "MAP", "--scheduler", "Nope"), "no scheduler 'Nope'"),
        (("--control-map", "MAP", "--scheduler", "FlowMatchEulerDiscrete"), "does not fit this model"),
    ],
)
def test_wrong_options(
    icexport, tiny_bundle: Path, apple: Path, control_map: Path, tmp_path: Path, monkeypatch, args, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"APPLE": apple, "MAP": control_map}
    run = icexport("generate", tiny_bundle, "--prompt", "a", *(files.get(arg, arg) for arg in args))
    assert run.exit_code == 2, run.stderr
    assert message in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_the_bundle_lacks_is_no_reason_for_another(
    icexport, dynamic_bundle: Path, control_map: Path, tmp_path: Path
) -> None:
    args = ("generate", dynamic_bundle, "--prompt", "a", "--control-map", control_map, "--output", tmp_path / "o.png")
    run = icexport(*args, "--backend", "torch")
    assert run.exit_code == 1
    assert "--backend torch" in run.stderr
    run = icexport(*args, "--device", "cuda:7")
    assert run.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_named(icexport, tiny_bundle: Path, control_map: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    (folder / "graphs" / "unet.onnx").write_bytes(b"x")
    run = icexport("generate", folder, "--prompt", "a", "--control-map", control_map, "--output", tmp_path / "o.png")
    assert run.exit_code == 1
    assert "graphs/unet.onnx was changed" in run.stderr


def test_unreadable_pictures(icexport, tiny_bundle: Path, apple: Path, tmp_path: Path, monkeypatch) -> None:
    files = {"text.png": b"no picture", "empty.png": b"", "cut.png": apple.read_bytes()[:150]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        run = icexport("generate", tiny_bundle, "--prompt", "a", "--image", tmp_path / name)
        assert run.exit_code == 2
        assert f"{name} cannot be read as a picture" in run.stderr
    Image.new("I", (8, 8)).save(tmp_path / "deep.tiff")
    run = icexport("generate", tiny_bundle, "--prompt", "a", "--image", tmp_path / "deep.tiff")
    assert "deep.tiff: The picture has mode 'I': integers of 32 bits" in " ".join(run.stderr.split())
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    run = icexport("generate", tiny_bundle, "--prompt", "a", "--image", apple)
    assert run.exit_code == 2
    assert "million pixels" in run.stderr


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, apple: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(pictures.UsageError, match="million pixels"):
        pictures.read_picture(apple)


def test_pictures_are_turned_and_flattened(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    found = pictures.read_picture(tmp_path / "turned.png")
    assert (found.size, found.mode, found.getpixel((0, 0))) == ((4, 8), "RGB", (255, 255, 255))
    assert pictures.read_picture(tmp_path / "turned.png", transparent="black").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("how", "size", "left"), [("crop", (16, 16), "red"), ("stretch", (16, 16), "red"), ("pad", (16, 8), "red")]
)
def test_fit(how: pictures.Fit, size: tuple[int, int], left: str) -> None:
    image = Image.new("RGB", (64, 32), "red")
    found = pictures.fit(image, 16, 16, how)
    assert found.size == size
    padded = pictures.pad(found, 16, 16)
    assert padded.size == (16, 16)
    assert padded.getpixel((8, 0)) == ((0, 0, 0) if how == "pad" else (255, 0, 0))
    assert padded.getpixel((0, 8)) == (255, 0, 0)


def test_crop_keeps_the_middle() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert pictures.fit(image, 10, 10, "crop").getcolors() == [(100, (255, 255, 255))]


def test_a_very_long_picture_keeps_a_pixel() -> None:
    assert pictures.fit(Image.new("RGB", (1000, 1)), 16, 16, "pad").size == (16, 1)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(self: Image.Image, file: Path, **_options: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        pictures.save_png(Image.new("RGB", (4, 4)), path, {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
