"""Picture folders and HF data sets: everything that ``datasets`` opens as a table with random access.

``datasets`` never decodes here (``Image(decode=False)``): a damaged file would end its iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from icexport.errors import UsageError
from training.data.config import DataConfig
from training.data.pictures import Content
from training.data.samples import Sample

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SAVED = ("dataset_dict.json", "state.json")


class Table:
    """The rows of one split, by number.

    Args:
        rows: has the columns that ``config`` names.
        config: names the columns.
    """

    def __init__(self, rows: datasets.Dataset, config: DataConfig) -> None:
        self._config = config
        self._root = Path(str(config.source)).expanduser().absolute()
        columns = [c for c in (config.image_column, config.caption_column, config.control_column) if c is not None]
        self._rows = rows.select_columns(columns)
        for name, feature in self._rows.features.items():
            if isinstance(feature, datasets.Image):
                self._rows = self._rows.cast_column(name, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        """Return all rows in order."""
        return map(self.sample, range(len(self)))

    def sample(self, index: int) -> Sample:
        """Return the row ``index``."""
        row = self._rows[index]
        image = self._content(row[self._config.image_column])
        control = self._config.control_column
        return Sample(
            id=self._id(index, image),
            image=image,
            caption=row[self._config.caption_column],
            control=None if control is None else self._content(row[control]),
        )

    def _content(self, value: Any) -> Content | None:
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        is_path = isinstance(value, str) and "://" not in value  # zip://a.png::pictures.zip is inside of an archive
        return self._root / value if is_path else value

    def _id(self, index: int, image: Content | None) -> str:
        """Return the file's path in the source's folder, where it has one: it can be looked up and mended."""
        if isinstance(image, Path) and image.is_relative_to(self._root):
            return image.relative_to(self._root).as_posix()
        return f"row {index}"


def open_table(config: DataConfig) -> Table:
    """Open a folder of pictures, a saved data set or one of the hub.

    Raises:
        UsageError: the data set does not exist, cannot be read, is empty, or lacks the split or a column.
    """
    try:
        rows = _load(config)
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise UsageError(
            f"The data set {config.source!r} (split {config.split!r}) cannot be opened: {reason}. Expected a folder "
            "of pictures with metadata.jsonl (a JSON object a line, with file_name and text), a saved data set, the "
            "name of one on the hub, or shards (*.tar)."
        ) from error
    if not len(rows):
        raise UsageError(f"The data set {config.source!r} (split {config.split!r}) is empty; expected pictures.")
    _check_columns(rows, config)
    return Table(rows, config)


def _load(config: DataConfig) -> datasets.Dataset:
    source = str(config.source)
    folder = Path(source).expanduser()
    if folder.is_file():
        raise UsageError(f"The data set {source!r} is a file; expected its folder.")
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UsageError(f"The folder {source!r} does not exist.")
        return datasets.load_dataset(source, split=config.split)
    if any((folder / name).exists() for name in _SAVED):
        saved = datasets.load_from_disk(folder)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or config.split): saved}
        _check_split(source, config.split, splits)
        return splits[config.split]
    if metadata := _metadata(folder):
        # Only this file is named: left to itself, `datasets` lists the folder some sixty times to guess its splits,
        # and takes it for text if captions lie beside the pictures.
        _check_split(source, config.split, metadata)
        files = {config.split: metadata[config.split]}
        return datasets.load_dataset("imagefolder", data_files=files, split=config.split)
    return datasets.load_dataset(str(folder), split=config.split)


def _metadata(folder: Path) -> dict[str, str]:
    """Find a picture folder's metadata files by split: of the folder, else of each folder in it, which is a split."""
    for name in _METADATA:
        if (folder / name).exists():
            return {"train": str(folder / name)}
    return {file.parent.name: str(file) for name in reversed(_METADATA) for file in sorted(folder.glob(f"*/{name}"))}


def _check_split(source: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise UsageError(f"The data set {source!r} has no split {split!r}; it has: {', '.join(splits)}.")


def _check_columns(rows: datasets.Dataset, config: DataConfig) -> None:
    for field in ("image_column", "caption_column", "control_column"):
        name = getattr(config, field)
        if name is not None and name not in rows.column_names:
            hint = " Captions of a picture folder are in its metadata.jsonl." if field == "caption_column" else ""
            raise UsageError(
                f"The data set {config.source!r} has no column {name!r}; it has: {', '.join(rows.column_names)}. Name "
                f"the right one with {field}=.{hint}"
            )
        if name is not None and not _fits(rows.features[name], captions=field == "caption_column"):
            expected = "text" if field == "caption_column" else "pictures or names of picture files"
            raise UsageError(
                f"Column {name!r} of the data set {config.source!r} holds {rows.features[name]}; expected {expected}. "
                f"Name another with {field}=."
            )


def _fits(feature: Any, captions: bool) -> bool:
    if captions and isinstance(feature, datasets.List):
        feature = feature.feature
    kinds = ("string", "large_string", "null") if captions else ("string", "large_string", "binary", "large_binary")
    is_value = isinstance(feature, datasets.Value) and feature.dtype in kinds
    return is_value or (isinstance(feature, datasets.Image) and not captions)
