"""Drawing: the same picture however it is batched, nothing drawn twice, nothing mixed up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from icexport.errors import CheckpointError, UsageError
from icexport.graphs.profile import SizeRange
from icexport.progress import silent
from training.evaluation import generate
from training.evaluation.generate import (
    Item,
    Sampler,
    Sampling,
    claim,
    draw_missing,
    load_bundle,
    load_model,
    picture_path,
    picture_seed,
    sampling_settings,
)

SHORT = Sampling(steps=2)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder, found = tmp_path_factory.mktemp("maps"), []
    for i in range(3):
        control = Image.new("RGB", (16, 16))
        ImageDraw.Draw(control).rectangle((2, 2 + i, 12, 12), outline="white")
        control.save(folder / f"{i}.png")
        found.append(Item(f"pictures/{i}.jpg", f"a {'bcd'[i]}", folder / f"{i}.png", str(i)))
    return found


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    return load_model("canny", str(tiny_model), None, SHORT)


def levels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path), dtype=int) for path in sorted(folder.glob("*.png"))}


def draw(sampler: Sampler, items: list[Item], folder: Path, **options) -> int:
    return draw_missing(sampler, SHORT, items, 2, folder, progress=silent, **options)


def test_batches_order_and_interruptions_change_no_picture(
    sampler: Sampler, items: list[Item], tmp_path: Path
) -> None:
    assert draw(sampler, items, tmp_path / "together", batch_size=6) == 6
    assert draw(sampler, items[2:], tmp_path / "apart", batch_size=1) == 2
    assert draw(sampler, items[::-1], tmp_path / "apart", batch_size=3) == 4
    together, apart = levels(tmp_path / "together"), levels(tmp_path / "apart")
    assert list(together) == [f"pictures%2F{i}.jpg-{group}.png" for i in range(3) for group in range(2)]
    assert together.keys() == apart.keys()
    for name, one in together.items():
        assert np.abs(one - apart[name]).max() <= 1, name
    assert len({one.tobytes() for one in together.values()}) == 6


def test_what_is_there_is_not_drawn_again(sampler: Sampler, items: list[Item], tmp_path: Path, monkeypatch) -> None:
    draw(sampler, items[:1], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    drawn = []
    original = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda *args: drawn.append(args[1]) or original(*args))
    assert draw(sampler, items[:2], tmp_path) == 2
    assert drawn == [["a c", "a c"]]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert draw(sampler, items[:2], tmp_path) == 0


def test_an_interrupted_run_leaves_whole_pictures(sampler: Sampler, items: list[Item], tmp_path: Path, monkeypatch):
    original, calls = Sampler.draw, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(Sampler, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(sampler, items, tmp_path, batch_size=2)
    assert len(levels(tmp_path)) == 2
    assert all(path.suffix == ".png" and not path.name.startswith(".") for path in tmp_path.iterdir())
    assert draw(sampler, items, tmp_path, batch_size=2) == 4


def test_pictures_of_other_data_are_not_reused(sampler: Sampler, items: list[Item], tmp_path: Path) -> None:
    draw(sampler, items[:1], tmp_path)
    with pytest.raises(UsageError, match="another prompt: the data has changed"):
        draw(sampler, [replace(items[0], caption="a ä")], tmp_path)
    with pytest.raises(UsageError, match="another control_sha256"):
        draw(sampler, [replace(items[0], digest="9")], tmp_path)
    picture_path(tmp_path, items[0].id, 0).write_bytes(b"cut")
    with pytest.raises(UsageError, match="Delete it to have it drawn again"):
        draw(sampler, items[:1], tmp_path)


def test_control_changes_the_picture_and_scale_0_switches_it_off(
    sampler: Sampler, items: list[Item], tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    other = replace(items[0], control=tmp_path / "white.png")
    folders = []
    for number, (item, scale) in enumerate([(items[0], 20.0), (other, 20.0), (items[0], 0.0), (other, 0.0)]):
        folders.append(tmp_path / str(number))
        draw(sampler, [item], folders[-1], scale=scale)
    found = [next(iter(levels(folder).values())) for folder in folders]
    assert np.abs(found[0] - found[1]).max() > 2
    assert np.array_equal(found[2], found[3])
    assert np.abs(found[0] - found[2]).max() > 2


def test_a_bundle_draws_what_its_model_draws(
    sampler: Sampler, items: list[Item], tiny_bundle: Path, tmp_path: Path
) -> None:
    engines = load_bundle(tiny_bundle, SHORT, "onnxruntime")
    assert engines.size == sampler.size == (16, 16)
    assert engines.calls == SizeRange(1, 1, 4)
    draw(sampler, items, tmp_path / "torch", batch_size=2)
    draw(engines, items, tmp_path / "engines", batch_size=8)
    ours, theirs = levels(tmp_path / "engines"), levels(tmp_path / "torch")
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) <= 2


def test_a_fixed_batch_is_filled_up(items: list[Item], tmp_path: Path) -> None:
    """A bundle built for exactly four pictures still draws two."""

    class Pipe:
        device = torch.device("cpu")

        def __call__(self, prompts, image, generator, **_options):
            assert len(prompts) == len(image) == len(generator) == 4
            self.images = torch.tensor([[len(prompt) / 255, 0, 0] for prompt in prompts])[..., None, None]
            self.images = self.images.expand(-1, -1, 16, 16)
            return self

    assert draw(Sampler(Pipe(), {}, "k", (16, 16), SizeRange(4, 4, 4)), items[:1], tmp_path, batch_size=9) == 2
    assert len(levels(tmp_path)) == 2


def test_seeds_are_stable_and_differ() -> None:
    assert picture_seed(42, "a", 0) == 6454129850729350191
    seeds = {picture_seed(s, i, g) for s in (42, 43) for i in ("a", "b", "a\0", "1") for g in range(4)}
    assert len(seeds) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_names_of_files() -> None:
    folder = Path("x")
    assert picture_path(folder, "a b-1", 3) == folder / "a b-1-3.png"
    assert picture_path(folder, "../ä:%", 0).parent == folder
    ids = ("a/b", "a%2Fb", "a\\b", "a:b", "..", "a\0b")
    assert len({picture_path(folder, i, 0).name for i in ids}) == len(ids)


def test_other_settings_are_an_error_that_names_them(sampler: Sampler, tmp_path: Path) -> None:
    settings = sampling_settings(sampler, SHORT)
    claim(tmp_path / "new", settings)
    claim(tmp_path / "new", settings)
    other = sampling_settings(sampler, replace(SHORT, steps=3, seed=1))
    with pytest.raises(UsageError, match="seed was 42 and is 1; steps was 2 and is 3"):
        claim(tmp_path / "new", other)
    (tmp_path / "new" / generate.SETTINGS).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        claim(tmp_path / "new", settings)


def test_settings_know_the_weights(sampler: Sampler, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    copy = load_model("canny", str(tmp_path / "model"), None, SHORT)
    assert sampling_settings(copy, SHORT) == sampling_settings(sampler, SHORT)
    path = tmp_path / "model" / "controlnet-canny" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    changed = load_model("canny", str(tmp_path / "model"), None, SHORT)
    assert sampling_settings(changed, SHORT)["weights"] != sampling_settings(sampler, SHORT)["weights"]


def test_schedulers(tiny_model: Path) -> None:
    ddim = load_model("canny", str(tiny_model), None, replace(SHORT, scheduler="DDIM"))
    assert type(ddim.pipe.scheduler).__name__ == "DDIMScheduler"
    assert ddim.pipe.scheduler.config.beta_schedule == "scaled_linear"
    unipc = load_model("canny", str(tiny_model), None, SHORT)
    assert type(unipc.pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    with pytest.raises(UsageError, match="no scheduler 'Nope'"):
        load_model("canny", str(tiny_model), None, replace(SHORT, scheduler="Nope"))
    with pytest.raises(UsageError, match=r"does not fit this model. Those that do: unipc, .*DDIM"):
        load_model("canny", str(tiny_model), None, replace(SHORT, scheduler="FlowMatchEulerDiscrete"))


def test_a_model_that_is_none(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks unet/config.json"):
        load_model("canny", str(tmp_path), None, SHORT)
    with pytest.raises(UsageError, match="No controlnet for 'hed'"):
        load_model("hed", str(tiny_model), None, SHORT)
