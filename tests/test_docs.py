"""What the documentation and the examples tell people to type: it runs."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from icexport import reference_path
from icexport.cli.main import app
from icexport.runtime.refused import REFUSED
from tests.icexport.cli.conftest import Run
from tests.icexport.cli.conftest import icexport as runner
from tests.icexport.models.originals import original_controlnet, original_vae, single_file
from tests.icexport.runtime.test_habits import WORKS
from tests.training.data.making import folder as picture_folder

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = [DOCS / "start.md", *sorted(path for path in (DOCS / "guides").glob("*.md") if path.stem != "training")]
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OTHERS = {"pip", "make", "source", "accelerate", "python", "optimum-cli"}
"""Programs that are not run here: they install things, or need other machines."""

icexport = runner  # the fixture


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Words of each command in a page's shell blocks."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_bundle: Path) -> Path:
    """A folder with the files that the pages speak of, which are small here."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_model, folder / "my-model")
    shutil.copytree(tiny_model / "controlnet-canny", folder / "my-controlnet")
    save_file({n: t.contiguous() for n, t in single_file(tiny_model).items()}, folder / "model.safetensors")
    save_file({n: t.contiguous() for n, t in original_vae(tiny_model / "vae").items()}, folder / "vae.safetensors")
    torch.save(original_controlnet(tiny_model / "controlnet-canny"), folder / "controlnet.pth")
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
    picture.save(folder / "picture.png")
    return folder


@pytest.fixture
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(desk)
    return desk


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_pages_run_in_their_order(icexport: Run, at_desk: Path, page: Path) -> None:
    for words in commands(page):
        if words[0] == "icexport":
            run = icexport(*words[1:])
            assert run.exit_code == 0, f"{shlex.join(words)}\n{run.stderr}"
        else:
            assert words[0] in OTHERS, words
    if blocks(page, "python") and not (at_desk / "builds" / "canny").is_dir():
        assert icexport("build", "--cond", "canny").exit_code == 0
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {"__name__": "docs"})  # noqa: S102  our own page


SHORT = {
    "train": ["--steps", "2", "--batch-size", "2"],
    "evaluate": ["--max-samples", "1", "--images-per-condition", "1", "--steps", "2"],
    "build": ["--batch-size", "1"],
}
"""What makes training and judgement a matter of seconds."""


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/guides/training.md"])
def test_the_way_of_training(icexport: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "pictures", 4)
    picture_folder(tmp_path / "held-out", 2)
    (block,) = (code for code in blocks(ROOT / page, "bash") if "icexport train probe" in code)
    places = {"BASE": "reference", "START": str(reference_path() / "controlnet-depth")}
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]

    for program, command, *words in lines:
        if program == "icexport":
            run = icexport(command, *(places.get(word, word) for word in words), *SHORT[command])
            assert run.exit_code == 0, f"{command} {shlex.join(words)}\n{run.stderr}"


def options_of(words: list[str]) -> tuple[list[str], set[str]]:
    """Return the options in a command, and those that it has."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word.partition("=")[0] for word in words if word.startswith("--")], known | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    code = "\n".join([*blocks(page, "bash"), *re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)]).replace("\\\n", " ")
    lines = re.findall(r"^(icexport .*)$", code, re.MULTILINE) + re.findall(r"`(icexport [a-z][^`]*)`", text)
    for line in (line for line in lines if "..." not in line):
        given, known = options_of(shlex.split(line.replace("\n", " "), comments=True)[1:])
        assert set(given) <= known, line


def example_arguments(name: str, bundle: Path, desk: Path, model: Path, output: Path) -> list[object]:
    parts = ("--model", desk / "model.safetensors", "--model-config", desk / "my-model")
    return {
        "draw": [bundle, desk / "picture.png", "--steps", 2, "--output", output / "draw.png"],
        "best_of": [bundle, desk / "picture.png", "--steps", 1, "--pictures", 3, "--output", output / "best.png"],
        "step_engine": [bundle, desk / "picture.png", "--output", output / "pictures"],
        "threads": [bundle, "--steps", 1, "--pictures", 3, "--output", output / "pictures"],
        "same_as_diffusers": [bundle, model, "--steps", 3],
        "own_files": [*parts, "--controlnet", desk / "controlnet.pth", "--output", output / "own"],
    }[name]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples(
    example: Path,
    tiny_bundle: Path,
    tiny_model: Path,
    desk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = example_arguments(example.stem, tiny_bundle, desk, tiny_model, tmp_path)
    monkeypatch.setattr(sys, "argv", [str(word) for word in (example, *words)])

    runpy.run_path(str(example), run_name="__main__")

    printed = capsys.readouterr().out
    expected = {
        "draw": r"edge F1: \d\.\d{3}\n(step  \d, t = +\d+: probe error \d\.\d{4}\n){2}",
        "best_of": r"(seed \d: edge F1 \d\.\d{3}\n){3}seed \d follows its map best: .*best\.png\n",
        "step_engine": r"(call \d+, of \d pictures: (quick|late|unguided|careful) is done\n){4}",
        "threads": r"3 pictures are in .*pictures\n",
        "same_as_diffusers": r"largest difference of a value in \[0,1\]: (0|\d(\.\d)?e-0[5-9])\n",
        "own_files": r"(?s).*unet\.noise_pred: cosine 1\.000000, relative error .*",
    }[example.stem]
    assert re.fullmatch(expected, printed), printed
    if example.stem != "same_as_diffusers":
        assert any(tmp_path.iterdir())


def test_there_are_six_examples() -> None:
    expected = ["best_of", "draw", "own_files", "same_as_diffusers", "step_engine", "threads"]
    assert [path.stem for path in EXAMPLES] == expected


def test_the_reference_decides_every_name_of_diffusers() -> None:
    page = (DOCS / "reference" / "diffusers.md").read_text(encoding="utf-8")
    for name, reason in REFUSED.items():
        assert f"| `{name}` | refused: {reason} |" in page
    for name in WORKS:
        assert f"| `{name}` |" in page
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(rows) == WORKS | REFUSED.keys()
    assert rows == sorted(rows)
