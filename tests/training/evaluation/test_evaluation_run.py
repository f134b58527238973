"""Whole evaluations on a tiny model: what the result holds, and what stops one."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icexport import conditions
from icexport.errors import UsageError
from tests.steps import Told
from training.data.config import DataConfig
from training.evaluation.generate import Sampler, Sampling, load_model, picture_path
from training.evaluation.report import select
from training.evaluation.run import EvaluationConfig, count_steps, describe_extractor, evaluate

SHORT = Sampling(steps=2)


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    return load_model("canny", str(tiny_model), None, SHORT)


@pytest.fixture
def config(held_out_folder: Path, tmp_path: Path) -> EvaluationConfig:
    return EvaluationConfig(
        data=DataConfig(str(held_out_folder), resolution=16),
        condition=conditions.get("canny"),
        output=tmp_path / "out",
        sampling=SHORT,
        images_per_condition=2,
    )


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, held_out_folder: Path, hed_file: Path, sampler: Sampler
) -> Path:
    """The output of one evaluation; do not write into it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    data = DataConfig(str(held_out_folder), resolution=16)
    options = {"sampling": SHORT, "images_per_condition": 2, "no_control": True, "hed_weights": hed_file}
    evaluate(EvaluationConfig(data, conditions.get("canny"), output, batch_size=3, **options), sampler)
    return output


def test_the_result(finished: Path, held_out_folder: Path) -> None:
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["settings"]["condition"] == "canny"
    assert result["settings"].items() >= {"steps": 2, "seed": 42, "size": [16, 16], "dtype": "fp32"}.items()
    assert result["data"]["conditions"] == 5
    assert result["data"]["pictures"] == 10
    assert result["data"]["broken_pictures"] == 0
    assert [(row["id"], row["group"]) for row in result["pictures"]] == [
        (f"p{i}.png", g) for i in range(5) for g in (0, 1)
    ]

    condition, rows = conditions.get("canny"), []
    for row in result["pictures"]:
        name = row["id"]
        drawn = torch.from_numpy(np.asarray(Image.open(picture_path(finished / "pictures", name, row["group"]))) / 255)
        control = condition.extract(Image.open(held_out_folder / name))
        control = torch.from_numpy(np.asarray(control) / 255)
        rows.append(float(condition.score(drawn.permute(2, 0, 1)[None], control.permute(2, 0, 1)[None])))
        assert row["control"]["edge_f1"] == pytest.approx(rows[-1])
    summary = result["metrics"]["edge_f1"]
    assert summary["control"]["mean"] == pytest.approx(np.mean(rows))
    assert summary["control"]["low"] <= summary["control"]["mean"] <= summary["control"]["high"]
    off = [row["no_control"]["edge_f1"] for row in result["pictures"]]
    assert summary["no_control"]["mean"] == pytest.approx(np.mean(off))
    assert summary["control_minus_no_control"]["mean"] == pytest.approx(np.mean(rows) - np.mean(off))
    assert result["metrics"]["edge_f1_legacy"]["legacy"] is True
    assert result["metrics"]["clip_score"]["control"] is None
    assert "--clip-model" in result["metrics"]["clip_score"]["reason"]


def test_chance_is_the_score_against_another_conditions_map(finished: Path) -> None:
    result = json.loads((finished / "evaluation.json").read_text())
    condition = conditions.get("canny")
    for row in result["pictures"]:
        other = f"p{(int(row['id'][1]) + 2) % 5}.png"
        drawn, control = (
            torch.from_numpy(np.asarray(Image.open(path)) / 255).permute(2, 0, 1)[None]
            for path in (
                picture_path(finished / "pictures", row["id"], row["group"]),
                finished / "control-maps" / f"{other}.png",
            )
        )
        assert row["chance"]["edge_f1"] == pytest.approx(float(condition.score(drawn, control)))


def test_image_statistics(finished: Path) -> None:
    statistics = json.loads((finished / "evaluation.json").read_text())["image_statistics"]
    row = statistics["hed_vgg16"]
    assert row["title"] == "feature distance (HED-VGG16)"
    assert row["features"] == 512
    assert row["pictures"] == 5
    assert row["control"].keys() == row["no_control"].keys() == {"frechet", "kernel"}
    assert row["control"]["frechet"] > 0
    assert statistics["inception"] == {"title": "FID", "reason": "No Inception weights (--inception-weights)."}


def test_the_report_holds_everything_it_shows(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    sources = re.findall(r"<img[^>]*src='([^']*)'", page)
    assert len(sources) == 4 * 9  # three best, median and worst: map, picture, reading, control off
    for source in sources:
        assert Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))).size == (16, 16)
    assert "http" not in page
    assert "not computed: No CLIP model" in page
    assert str(finished) not in page


def test_captions_are_text_and_not_markup(held_out_folder: Path, sampler: Sampler, config, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(held_out_folder, folder)
    rows = [{"file_name": f"p{i}.png", "text": "<script>x</script> & 'q'"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate(replace(config, data=replace(config.data, source=str(folder)), max_samples=1), sampler)
    assert "<script>" not in (config.output / "report.html").read_text()


def test_finished_pictures_get_the_same_scores(finished: Path, config: EvaluationConfig) -> None:
    before = json.loads((finished / "evaluation.json").read_text())
    result = evaluate(config, pictures=finished / "pictures")
    assert result["metrics"]["edge_f1"]["control"] == before["metrics"]["edge_f1"]["control"]
    assert not (config.output / "settings.json").exists()
    assert result["settings"]["pictures"] == str(finished / "pictures")
    assert "seed" in before["pictures"][0]
    assert "seed" not in result["pictures"][0]


def test_a_second_run_only_judges(config: EvaluationConfig, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(replace(config, max_samples=2), sampler)
    monkeypatch.setattr(Sampler, "draw", None)
    told = Told()
    told.expect(count_steps(drawn=True, no_control=config.no_control))
    assert evaluate(replace(config, max_samples=2), sampler, progress=told) == first
    assert len(told.names) == told.expected
    assert told.parts[0] == ("read the data", 2, 2)
    assert ("score pictures", 0, 4) in told.parts
    with pytest.raises(UsageError, match="steps was 2 and is 4"):
        evaluate(replace(config, sampling=Sampling(steps=4)), sampler)


def test_broken_data_is_counted(
    held_out_folder: Path, config: EvaluationConfig, sampler: Sampler, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(held_out_folder, folder)
    (folder / "p1.png").write_bytes(b"no picture")
    Image.new("RGB", (16, 16)).save(folder / "p2.png")
    result = evaluate(replace(config, data=replace(config.data, source=str(folder)), max_samples=3), sampler)
    assert result["data"]["broken_pictures"] == 1
    assert list(result["data"]["broken"]) == ["p1.png"]
    assert result["data"]["blank_control_maps"] == ["p2.png"]
    assert [row["id"] for row in result["pictures"][::2]] == ["p0.png", "p2.png", "p3.png"]
    assert "1 broken pictures were left out" in (config.output / "report.html").read_text()


def test_one_condition_gives_no_interval_and_no_chance(
    config: EvaluationConfig, sampler: Sampler, hed_file: Path
) -> None:
    result = evaluate(replace(config, max_samples=1, hed_weights=hed_file), sampler)
    row = result["metrics"]["edge_f1"]
    assert row["control"]["low"] is None
    assert "chance" not in row
    assert "too few" in result["image_statistics"]["hed_vgg16"]["reason"]


def test_pictures_that_are_missing_or_of_another_size(
    finished: Path, config: EvaluationConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(finished / "pictures", folder)
    Image.new("RGB", (24, 16)).save(folder / "p0.png-0.png")
    with pytest.raises(UsageError, match=r"'p0.png' .* have 24 x 16 px, the control maps 16 x 16"):
        evaluate(config, pictures=folder)
    (folder / "p0.png-0.png").unlink()
    with pytest.raises(UsageError, match=r"lacks 1 of 10 pictures, for instance p0.png-0.png"):
        evaluate(config, pictures=folder)


def test_what_contradicts_itself(config: EvaluationConfig, sampler: Sampler, tmp_path: Path) -> None:
    for source in ({}, {"sampler": sampler, "pictures": tmp_path}):
        with pytest.raises(UsageError, match="either a model"):
            evaluate(config, **source)
    with pytest.raises(UsageError, match="leave out --no-control"):
        evaluate(replace(config, no_control=True), pictures=tmp_path)


def test_the_extractor_is_named(hed_file: Path) -> None:
    described = describe_extractor(conditions.get("hed", weights=hed_file))
    assert described["sha256"].keys() == {hed_file.name}
    assert described["options"] == {"weights": str(hed_file)}
    assert describe_extractor(conditions.get("canny"))["options"]["low_threshold"] == 60


def test_rows_of_the_report() -> None:
    rows = [{"control": {"m": value}} for value in range(100)]
    chosen = {place: [row["control"]["m"] for row in found] for place, found in select(rows, "m", True, 4).items()}
    assert chosen == {"best": [99, 98, 97, 96], "median": [51, 50, 49, 48], "worst": [3, 2, 1, 0]}
    assert [row["control"]["m"] for row in select(rows, "m", False, 2)["best"]] == [0, 1]
    for count in range(1, 12):
        shown = [row["control"]["m"] for found in select(rows[:count], "m", True, 4).values() for row in found]
        assert len(shown) == len(set(shown))
        assert shown
