"""Which pictures are trained on, and how they are cut to size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from icexport.errors import UsageError

Fit = Literal["crop", "random-crop", "stretch"]

_SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class DataConfig:
    """A set of captioned pictures.

    Attributes:
        source: where the pictures are, one of
            - a folder of pictures with ``metadata.jsonl`` (the imagefolder convention of HF datasets: a JSON object a
              line with ``file_name`` and ``text``; ``NAME_file_name`` is the picture of column ``NAME``), or a folder
              of such folders, its splits;
            - a folder that ``Dataset.save_to_disk`` wrote, or any other that ``datasets.load_dataset`` reads;
            - the name of a data set on the Hugging Face hub;
            - WebDataset shards: a pattern with ``*`` or ``{000..099}``, or several of these, of local files or URLs
              that fsspec opens. A sample is ``key.jpg`` (jpeg, png, webp) with ``key.txt``, or ``key.json`` with the
              caption under ``caption_column``, and ``key.<control_column>.png`` for a ready control map.
        split: name of the split; shards have none.
        image_column: pictures, or names of picture files. In shards a plain ``key.jpg`` counts, too.
        caption_column: captions. Of several captions of one picture training draws one, evaluation takes the first.
        control_column: ready control maps; None: they are computed from the pictures when needed.
        resolution: side of a square, or (height, width), in pixels; multiples of 8.
        fit: ``crop`` scales a picture until it covers the target and cuts the middle out, ``random-crop`` a random
            place, ``stretch`` scales both sides to the target. Control maps are cut in the same way.
        flip: mirror every second picture, drawn at random, with its control map. The caption stays as it is.
        workers: number of processes that load pictures, per training process; 0: it loads them itself.
        shuffle: whether every epoch has another order.
        shuffle_buffer: number of samples of shards that are read together to be shuffled, undecoded, per worker: more
            mixes better and takes more memory.
    """

    source: str | tuple[str, ...]
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    control_column: str | None = None
    resolution: int | tuple[int, int] = 512
    fit: Fit = "crop"
    flip: bool = False
    workers: int = 0
    shuffle: bool = True
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        """Make tuples of lists, as TOML and JSON have them.

        Raises:
            UsageError: a value is out of range; all such values are named.
        """
        for name in ("source", "resolution"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        sides = list(self.size)
        columns = [self.image_column, self.caption_column, self.control_column]
        faults = [
            message
            for wrong, message in (
                (not self.source or not all(self.source), "source is empty; expected a folder, a name or shards"),
                (
                    len(sides) != 2 or any(side < 8 or side % 8 for side in sides),
                    f"resolution is {self.resolution}; expected a multiple of 8, or (height, width) of such",
                ),
                (self.fit not in get_args(Fit), f"fit is {self.fit!r}; expected one of {', '.join(get_args(Fit))}"),
                (self.workers < 0, f"workers is {self.workers}; expected 0 or more"),
                (self.shuffle_buffer < 1, f"shuffle_buffer is {self.shuffle_buffer}; expected 1 or more"),
                (
                    len({*columns}) < 3 or "" in columns,
                    "image_column, caption_column and control_column must differ and not be empty; "
                    f"got {', '.join(map(repr, columns))}",
                ),
                (
                    self.is_shards and self.split != "train",
                    f"split is {self.split!r}, but shards have no splits; name the shards of that split as source",
                ),
            )
            if wrong
        ]
        if faults:
            raise UsageError(f"Data cannot be loaded: {'; '.join(faults)}.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    @property
    def is_shards(self) -> bool:
        """Whether the source is WebDataset shards."""
        return not isinstance(self.source, str) or self.source.lower().endswith(_SHARD_ENDINGS)
