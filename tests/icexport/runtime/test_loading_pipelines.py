from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessor

from icexport import InnerControlPipeline
from icexport.bundle.manifest import MANIFEST_NAME
from icexport.bundle.store import Bundle
from icexport.errors import BundleError, DamagedBundleError, SchemaError, UsageError
from tests.hashing import hash_files

CONTROL = torch.ones(1, 3, 16, 16)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bundle_may_be_given_open_or_as_a_path(tiny_bundle: Path) -> None:
    for bundle in (tiny_bundle, str(tiny_bundle), Bundle(tiny_bundle)):
        pipe = InnerControlPipeline.from_pretrained(bundle)
        assert pipe.backend == "onnxruntime"
        assert pipe.bundle.path == tiny_bundle


@pytest.mark.parametrize(
    "file",
    ["graphs/unet.onnx.data", "graphs/probe.onnx", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"],
)
def test_every_file_that_is_used_is_checked(copy: Path, file: str) -> None:
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)

    with pytest.raises(DamagedBundleError, match=f"{file} was changed"):
        InnerControlPipeline.from_pretrained(copy)


def test_a_newer_schema(copy: Path) -> None:
    change_manifest(copy, schema_version=99)

    with pytest.raises(SchemaError, match="Upgrade icexport"):
        InnerControlPipeline.from_pretrained(copy)


def test_no_bundle(tmp_path: Path, tiny_model: Path) -> None:
    for folder in (tmp_path / "missing", tiny_model):
        with pytest.raises(BundleError, match="is not a bundle"):
            InnerControlPipeline.from_pretrained(folder)


def test_a_scheduler_of_another_library(copy: Path) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "Popen"}))
    change_manifest(copy, files=hash_files(copy))

    with pytest.raises(UsageError, match="no scheduler 'Popen'"):
        InnerControlPipeline.from_pretrained(copy)


class Checker(nn.Module):
    """Finds something in every second picture."""

    def forward(self, images: Any, clip_input: torch.Tensor) -> tuple[Any, list[bool]]:
        assert clip_input.shape[1] == 3
        flags = [index % 2 == 1 for index in range(len(clip_input))]
        for image, flag in zip(images, flags, strict=True):
            if flag:
                image[:] = 0
        return images, flags


@pytest.mark.filterwarnings("ignore")
def test_a_safety_checker(copy: Path) -> None:
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(copy / "feature_extractor")
    change_manifest(copy, files=hash_files(copy))
    pipe = InnerControlPipeline.from_pretrained(copy, safety_checker=Checker())
    pipe.set_progress_bar_config(disable=True)

    for check in (True, False):
        found = pipe("a", CONTROL, num_inference_steps=1, num_images_per_prompt=2, check_fidelity=check)

        assert found.nsfw_content_detected == [False, True]
        assert np.asarray(found.images[0]).any()
        assert not np.asarray(found.images[1]).any()


def test_a_safety_checker_needs_its_feature_extractor(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="feature extractor"):
        InnerControlPipeline.from_pretrained(tiny_bundle, safety_checker=Checker())
