"""Image statistics: how far the generated pictures as a set are from real ones, and from their captions.

FID is only what Inception's published weights give. Without them the same formulas run on the edge network's VGG16,
and the result is called a feature distance: it ranks models on one data set, and compares with nothing published.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from icexport.conditions.hed import BGR_MEAN, load_network
from icexport.conditions.weights import load_state, read_state
from icexport.errors import CheckpointError, UsageError
from training.evaluation.inception import SIDE, FidInception

HED_BLOCKS = 4
"""Blocks of the edge network's VGG16 that are run: 512 channels after the fourth."""


class FeatureExtractor(ABC):
    """Maps 8-bit pictures to one feature vector each.

    Args:
        device: device where it computes.
    """

    name: str
    title: str
    """What its Fréchet distance is called."""
    kernel_title: str

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._network, self._device = network.to(device), device

    @abstractmethod
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """Return features ``[N,D]`` float64 on the CPU of RGB pictures of any one size."""


class HedVgg16(FeatureExtractor):
    """Fourth block of the edge network's VGG16, averaged over the picture: 512 numbers.

    Args:
        weights: weights as `icexport.conditions.Hed`'s.
        device: device where it computes.
    """

    name = "hed_vgg16"
    title = "feature distance (HED-VGG16)"
    kernel_title = "kernel distance (HED-VGG16)"

    def __init__(self, weights: Path, device: torch.device) -> None:
        network = load_network(weights)
        super().__init__(network, device)
        self._blocks = network.blocks[:HED_BLOCKS]

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """See `FeatureExtractor`."""
        levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(self._device)
        features = levels.permute(0, 3, 1, 2).flip(1) - levels.new_tensor(BGR_MEAN, dtype=torch.float32).view(3, 1, 1)
        for index, block in enumerate(self._blocks):
            if index:
                features = nn.functional.max_pool2d(features, 2, ceil_mode=True)
            features = block(features)
        return features.mean((2, 3)).double().cpu()


class Inception(FeatureExtractor):
    """FID's Inception, fed as clean-fid does: bicubic to 299 px by Pillow, in floating point.

    Args:
        weights: ``.safetensors`` or ``.pth`` with the state that pytorch-fid publishes
            (``pt_inception-2015-12-05-6726825d.pth``).
        device: device where it computes.

    Raises:
        CheckpointError: the file holds other weights, for instance torchvision's, with which the result is not FID.

    Source: Parmar, Zhang and Zhu, "On aliased resizing and surprising subtleties in GAN evaluation", 2022.
    """

    name = "inception"
    title = "FID"
    kernel_title = "KID"

    def __init__(self, weights: Path, device: torch.device) -> None:
        network, state = FidInception(), read_state(weights)
        if "AuxLogits.fc.weight" in state or state.get("fc.weight", torch.empty(0)).shape[:1] == (1000,):
            raise CheckpointError(
                f"{weights} holds torchvision's Inception, trained anew: its distance is not FID. Give pytorch-fid's "
                "pt_inception-2015-12-05-6726825d.pth."
            )
        counters = {name: value for name, value in network.state_dict().items() if name.endswith("batches_tracked")}
        load_state(network, {**counters, **state}, weights)
        super().__init__(network, device)

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """See `FeatureExtractor`."""
        levels = torch.from_numpy(np.stack([resize_like_clean_fid(picture) for picture in pictures]))
        return self._network(levels.to(self._device)).double().cpu()


class ClipScore:
    """100 times the cosine of picture and caption in CLIP's space, at least 0.

    Args:
        model: folder or Hub id of a transformers CLIP model with its processor.
        device: device where it computes.

    Raises:
        CheckpointError: the model cannot be loaded.

    Source: Hessel et al., "CLIPScore", 2021, with the factor 100 of torchmetrics.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            network: Any = CLIPModel.from_pretrained(model, use_safetensors=True)
            self._processor: Any = CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"The CLIP model {model!r} cannot be loaded ({' '.join(str(error).split())}). Give the folder or Hub "
                "id of a CLIPModel with its processor, as openai/clip-vit-base-patch16."
            ) from error
        self._model, self._device = network.to(device).eval(), device

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], captions: list[str]) -> Tensor:
        """Return ``[N]`` in [0,100]; captions are cut where CLIP's text ends."""
        inputs = self._processor(text=captions, images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = self._model(**inputs.to(self._device))
        cosine = nn.functional.cosine_similarity(found.image_embeds.double(), found.text_embeds.double())
        return (100 * cosine).clamp(min=0).cpu()


def resize_like_clean_fid(picture: Image.Image) -> np.ndarray:
    """Return an RGB picture as float32 ``[3,299,299]`` in [0,255], not rounded."""
    bands = (band.convert("F").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for band in picture.split())
    return np.stack([np.asarray(band).clip(0, 255) for band in bands])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of the normal distributions with the means and covariances of two sets.

    Args:
        a: features ``[N,D]``, N at least 2.
        b: features ``[M,D]``.

    Returns:
        At least 0. Sets of finite size make it too large, the more the smaller they are: compare equal sizes only.

    Raises:
        UsageError: the features have other shapes.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982, equation 4.
    """
    _require_sets(a, b)
    a, b = a.double(), b.double()
    covariances = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(a.shape[1], -1)
    # tr sqrt(A B) by the symmetric sqrt(A) B sqrt(A): unlike A B's, its eigenvalues stay real where A is singular.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * shared
    return max(0.0, float(distance))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Compute KID's squared maximum mean discrepancy, cubic kernel, without bias: near 0, or below, for equal sets.

    Args:
        a: features ``[N,D]``, N at least 2.
        b: features ``[M,D]``.

    Raises:
        UsageError: the features have other shapes.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, equations 3 and 4.
    """
    _require_sets(a, b)
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = 0.0
    for x in (a, b):
        values = kernel(x, x)
        within += float(values.sum() - values.trace()) / (len(x) * (len(x) - 1))
    return within - 2 * float(kernel(a, b).mean())


def _require_sets(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UsageError(
            f"A distance needs two sets of at least two feature vectors of one length, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
