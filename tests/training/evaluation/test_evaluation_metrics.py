"""Metrics of finished pictures: against values worked out by hand, or the code that they must agree with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from transformers import AutoModelForDepthEstimation

from icexport import conditions
from icexport.conditions.base import Condition
from icexport.errors import UsageError
from tests.tiny_models import save_tiny_depth
from training.evaluation import metrics
from training.evaluation.metrics import METRICS, score_pictures, unavailable


def pictures(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Patches of random colours, in 8 bits; another seed has patches of another size."""
    coarse = (
        torch.randint(256, (batch, 3, 7 + 2 * seed, 7 + 2 * seed), generator=torch.Generator().manual_seed(seed)) / 255
    )
    return F.interpolate(coarse, (height, width), mode="nearest")


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dpt")
    save_tiny_depth(path)
    return path


@pytest.fixture(params=["canny", "hed", "lineart", "depth"])
def condition(request: pytest.FixtureRequest, hed_file: Path, depth_folder: Path) -> Condition:
    options = {"hed": {"weights": hed_file}, "depth": {"model": depth_folder}}.get(request.param, {})
    return conditions.get(request.param, **options)


def test_the_first_metric_is_the_conditions_own_score(condition: Condition) -> None:
    drawn, controls = pictures(3, 40, 48), condition.extract_batch(pictures(3, 40, 48, seed=1))
    scores = score_pictures(condition, drawn, controls)
    first, metric = next(iter(METRICS[condition.name].items()))
    torch.testing.assert_close(scores[first], condition.score(drawn, controls))
    assert metric.higher_is_better == condition.higher_is_better
    assert metric.unit == condition.unit
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(scores, (3,))


def test_every_metric_is_computed_or_has_a_reason(condition: Condition) -> None:
    for side in (175, 176):
        scores = score_pictures(condition, pictures(1, side, 176), condition.extract_batch(pictures(1, side, 176, 1)))
        reasons = unavailable(condition, side, 176)
        assert not scores.keys() & reasons.keys()
        assert scores.keys() | reasons.keys() == METRICS[condition.name].keys()
    if condition.name in ("hed", "lineart"):
        assert "176 x 175" in unavailable(condition, 175, 176)["ms_ssim"]


def test_a_perfect_picture_and_a_mean_one(condition: Condition) -> None:
    drawn = pictures(1, 176, 176)
    own, other = condition.extract_batch(drawn), condition.extract_batch(pictures(1, 176, 176, seed=1))
    best, worse = score_pictures(condition, drawn, own), score_pictures(condition, drawn, other)
    for name, metric in METRICS[condition.name].items():
        assert ((best[name] > worse[name]) == metric.higher_is_better).all(), name
        if not metric.legacy:
            perfect = torch.full((1,), 1.0 if metric.higher_is_better else 0.0)
            torch.testing.assert_close(best[name], perfect, atol=0.3 if "rmse" in name else 1e-3, rtol=0)


def test_exact_f1_is_that_of_torchmetrics() -> None:
    maps = torch.rand(2, 4, 1, 9, 9, generator=torch.Generator().manual_seed(0)).round()
    maps[:, 3] = 0
    ours = metrics.exact_f1(*maps)
    theirs = [BinaryF1Score()(a.flatten().int(), b.flatten().int()) for a, b in zip(*maps, strict=True)]
    torch.testing.assert_close(ours, torch.stack(theirs))
    assert ours[3] == 0


def test_legacy_canny_reads_with_kornia_and_caps_psnr() -> None:
    from kornia.filters import canny

    condition, drawn = conditions.get("canny"), pictures(2, 40, 40)
    edges = canny(drawn, 0.1, 0.2)[1]
    scores = score_pictures(condition, drawn, edges.expand(-1, 3, -1, -1))
    torch.testing.assert_close(scores["edge_f1_legacy"], torch.ones(2))
    torch.testing.assert_close(scores["psnr_legacy"], torch.full((2,), 100.0))
    assert (scores["edge_f1_exact"] < 1).all()


def test_ms_ssim_is_that_of_one_picture_at_a_time() -> None:
    condition = conditions.get("lineart")
    drawn, controls = pictures(3, 176, 180), condition.extract_batch(pictures(3, 176, 180, seed=1))
    together = score_pictures(condition, drawn, controls)["ms_ssim"]
    levels = (255 * condition.extract_batch(drawn)[:, :1]).round() / 255
    alone = [
        multiscale_structural_similarity_index_measure(levels[i : i + 1], controls[i : i + 1, :1], data_range=1.0)
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


def test_lineart_wraps_around_as_uint8_does() -> None:
    drawing = np.arange(256, dtype=np.uint8)  # black lines on white, as the published detector gives them
    published = torch.from_numpy(np.uint8(1) - drawing).float() / 255
    ours = metrics.wrapped_lineart(torch.from_numpy(255 - drawing).float() / 255)
    torch.testing.assert_close(ours, published)
    assert (255 * ours[:2]).round().tolist() == [1, 0]


def test_legacy_depth_divides_by_the_maximum_and_the_label_is_stretched(depth_folder: Path) -> None:
    condition = conditions.get("depth", model=depth_folder)
    drawn, controls = pictures(2, 32, 32), pictures(2, 32, 32, seed=1)[:, :1].expand(-1, 3, -1, -1)
    model = AutoModelForDepthEstimation.from_pretrained(depth_folder).eval()
    with torch.no_grad():
        predicted = model((drawn - 0.5) / 0.5).predicted_depth[:, None]
    predicted = F.interpolate(predicted, (32, 32), mode="bicubic").clamp(min=0)[:, 0].numpy()
    expected = []
    for depth, control in zip(predicted, controls[:, 0].double().numpy(), strict=True):
        label = 255 * (control - control.min()) / (control.max() - control.min())
        levels = (255 * depth / depth.max()).astype("uint8").astype(float)
        expected.append(np.sqrt(np.square(levels - label.astype("uint8")).mean()))
    scores = score_pictures(condition, drawn, controls)
    np.testing.assert_allclose(scores["depth_rmse_legacy"], expected, atol=0.1)


def test_legacy_depth_keeps_the_offset_of_the_prediction() -> None:
    depth = torch.tensor([2.0, 3.0, 4.0, -1.0]).view(1, 1, 2, 2)
    assert metrics.legacy_depth(depth).flatten().tolist() == [127, 191, 255, 0]
    stretched = torch.tensor([0.0, 0.5, 1.0, 0.0]).view(1, 1, 2, 2)
    levels = torch.tensor([127.0, 127.0, 255.0, 0.0]).view(1, 1, 2, 2)
    assert metrics.legacy_depth_rmse(levels, 3 * stretched).item() == pytest.approx(127 / 2)


def test_affine_depth_rmse() -> None:
    target = pictures(2, 20, 20)[:, :1].double()
    torch.testing.assert_close(
        metrics.affine_depth_rmse(3 - 7 * target, target), torch.zeros(2).double(), atol=1e-6, rtol=0
    )
    flat = metrics.affine_depth_rmse(torch.ones_like(target), target)
    stretched = 255 * (target - target.amin((1, 2, 3), keepdim=True))
    stretched = stretched / (target.amax((1, 2, 3), keepdim=True) - target.amin((1, 2, 3), keepdim=True))
    torch.testing.assert_close(flat, stretched.std((1, 2, 3), correction=0))
    noisy = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).double()
    for i in range(2):
        x, y = noisy[i].flatten().numpy(), stretched[i].flatten().numpy()
        fit = np.polyval(np.polyfit(x, y, 1), x)
        assert metrics.affine_depth_rmse(noisy, target)[i] == pytest.approx(np.sqrt(np.square(fit - y).mean()))


def test_blank_maps_give_numbers(condition: Condition) -> None:
    blank = torch.zeros(1, 3, 40, 40)
    for drawn, control in ((blank, blank), (pictures(1, 40, 40), blank), (blank, pictures(1, 40, 40))):
        for name, values in score_pictures(condition, drawn, control).items():
            assert values.isfinite().all(), name


def test_a_soft_canny_is_judged_by_its_edges() -> None:
    soft, drawn = conditions.get("canny", soft=True), pictures(1, 40, 40)
    controls = conditions.get("canny").extract_batch(drawn)
    assert score_pictures(soft, drawn, controls)["edge_f1"].item() == pytest.approx(1)


def test_wrong_shapes() -> None:
    with pytest.raises(UsageError, match="number, height and width"):
        score_pictures(conditions.get("canny"), pictures(2, 40, 40), pictures(1, 40, 40))


def test_a_depth_extractor_of_ones_own_has_no_legacy_number() -> None:
    class Bright(Condition):
        name, polarity, metric, unit, higher_is_better = "depth", "", "", "8-bit levels", False

        def _extract(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean(1, keepdim=True)

        def _compare(self, readings: torch.Tensor, control_maps: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    scores = score_pictures(Bright(), pictures(2, 20, 20), pictures(2, 20, 20))
    assert scores.keys() == {"depth_rmse", "depth_rmse_affine"}
    assert "normalised depth only" in unavailable(Bright(), 20, 20)["depth_rmse_legacy"]


def test_readings_are_those_of_the_saved_file(tmp_path: Path) -> None:
    drawn = pictures(1, 40, 40)
    levels = (255 * drawn[0]).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(tmp_path / "a.png")
    saved = torch.from_numpy(np.asarray(Image.open(tmp_path / "a.png")).copy()).permute(2, 0, 1)[None] / 255
    condition = conditions.get("canny")
    assert torch.equal(metrics.read(condition, drawn).maps, metrics.read(condition, saved).maps)
