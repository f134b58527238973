"""What loader workers send: a batch as small as it gets, with what was wrong on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.samples import Fault, Record


class Parcel(NamedTuple):
    """A batch of B pictures.

    Attributes:
        pixels: uint8 ``[B,3,H,W]``.
        control: control maps, as ``pixels``; None: the source has none.
        captions: B texts.
        ids: B names for messages.
        faults: what was met while the batch was put together.
        cursor: where the stream goes on after the batch, JSON-able; None: the batch's number says it.
    """

    pixels: Tensor
    control: Tensor | None
    captions: list[str]
    ids: list[str]
    faults: list[Fault]
    cursor: dict[str, int] | None


def pack(records: Sequence[Record], faults: Sequence[Fault], cursor: dict[str, int] | None = None) -> Parcel:
    """Return the batch of ``records``, all of one size."""
    controls = [record.control for record in records if record.control is not None]
    return Parcel(
        pixels=_stack([record.image for record in records]),
        control=_stack(controls) if controls else None,
        captions=[record.caption for record in records],
        ids=[record.id for record in records],
        faults=[*faults, *(fault for record in records for fault in record.faults)],
        cursor=cursor,
    )


def _stack(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
