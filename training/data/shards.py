"""WebDataset shards: tar files of samples, read from front to back.

The readers that exist do not fit. That of ``datasets`` (5.2) ends at the first caption that is missing, not UTF-8 or
not JSON, at a second picture format and at a cut archive, and loses its shuffle buffer when it is resumed;
``webdataset`` cannot be resumed at all. The archives themselves are read by ``tarfile`` and opened, wherever they are,
by ``fsspec``.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import fsspec

from icexport.errors import UsageError
from training.data.config import DataConfig
from training.data.samples import BROKEN, Fault, Sample

_PICTURES = ("jpg", "jpeg", "png", "webp")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PEEKED = 100
"""Samples that are looked at before training, for columns that no sample has."""


class Shards:
    """Tar files that exist and hold the columns that the configuration names.

    Attributes:
        urls: URLs of the shards, in the order of their names.

    Args:
        config: names the shards and what to read from them.

    Raises:
        UsageError: there are no shards or samples, or none of the first samples has a picture, caption or control map.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        patterns = [config.source] if isinstance(config.source, str) else config.source
        self.urls = tuple(dict.fromkeys(url for pattern in patterns for url in _find(pattern)))
        self._check()

    def __iter__(self) -> Iterator[Sample | Fault]:
        """Yield all samples of all shards in order."""
        for url in self.urls:
            yield from self.read(url)

    def read(self, url: str) -> Iterator[Sample | Fault]:
        """Yield the samples of one shard; a fault at its end if it cannot be read further."""
        for item in _read(url):
            yield item if isinstance(item, Fault) else self._sample(*item)

    def _sample(self, name: str, fields: dict[str, bytes]) -> Sample:
        control = self._config.control_column
        image = _picture(fields, self._config.image_column)
        return Sample(
            id=name,
            image=_picture(fields, None) if image is None else image,
            caption=self._caption(fields),
            control=None if control is None else _picture(fields, control),
        )

    def _caption(self, fields: dict[str, bytes]) -> Any:
        if "txt" in fields:
            return fields["txt"].decode("utf-8", errors="replace")
        return _described(fields).get(self._config.caption_column)

    def _check(self) -> None:
        fault, first, count = None, dict[str, bytes](), 0
        lacking = {"picture", "caption"} | ({"control map"} if self._config.control_column else set())
        for item in islice((item for url in self.urls for item in _read(url)), _PEEKED):
            if isinstance(item, Fault):
                fault = fault or item
                continue
            sample = self._sample(*item)
            first, count = first or item[1], count + 1
            values = {"picture": sample.image, "caption": sample.caption, "control map": sample.control}
            lacking -= {name for name, value in values.items() if value}
            if not lacking:
                return
        where = f"{self.urls[0]} and the next shards" if len(self.urls) > 1 else self.urls[0]
        if not count:
            reason = f" ({fault.id}: {fault.reason})" if fault else ""
            raise UsageError(f"There are no samples in {where}{reason}; expected tar files of samples.")
        fixes = {
            "picture": "key.jpg, key.png or key.webp; name another with image_column=",
            "caption": f"key.txt, or {self._config.caption_column!r} in key.json; name another with caption_column=",
            "control map": f"key.{self._config.control_column}.png; name another with control_column=",
        }
        raise UsageError(
            f"No {' and no '.join(sorted(lacking))} in the first {count} samples of {where}: expected "
            f"{'; '.join(fixes[name] for name in sorted(lacking))}. The first sample has: {', '.join(_names(first))}."
        )


def _read(url: str) -> Iterator[tuple[str, dict[str, bytes]] | Fault]:
    """Yield (id, contents by ending) of the samples of one shard; a fault at its end if it cannot be read further."""
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for key, fields in _groups(archive):
                yield f"{url.rsplit('/', 1)[-1]}/{key}", fields
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        yield Fault(BROKEN, url, f"the shard cannot be read any further: {error}")


def _groups(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, contents by ending) of the samples: consecutive files whose names are equal up to the first dot."""
    current, fields = "", dict[str, bytes]()
    for member in archive:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not (member.isfile() and stem and dot):
            continue
        key = folder + slash + stem
        if fields and key != current:
            yield current, fields
            fields = {}
        current = key
        content = archive.extractfile(member)
        fields[extension.lower()] = b"" if content is None else content.read()
    if fields:
        yield current, fields


def _described(fields: dict[str, bytes]) -> dict[str, Any]:
    """Return what ``key.json`` says; empty if there is none, or none that can be used."""
    try:
        described = json.loads(fields.get("json", b"{}"))
    except ValueError:
        return {}
    return described if isinstance(described, dict) else {}


def _names(fields: dict[str, bytes]) -> list[str]:
    """Return the fields of a sample, for a message."""
    return [f"key.{ending}" for ending in fields] + [f"{name!r} in key.json" for name in _described(fields)]


def _picture(fields: dict[str, bytes], column: str | None) -> bytes | None:
    """Return the picture ``key.<column>.<ending>``; ``key.<ending>`` without a column."""
    names = (ending if column is None else f"{column.lower()}.{ending}" for ending in _PICTURES)
    return next((fields[name] for name in names if name in fields), None)


def _find(pattern: str) -> Iterable[str]:
    """Yield the files that ``pattern`` names, in order.

    Raises:
        UsageError: there are no such files, or fsspec does not know how to open them.
    """
    for url in expand_braces(pattern):
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"The shards {url!r} cannot be opened: {error}.") from error
        is_remote = "://" in url
        if "*" in path or "?" in path:
            found = sorted(files.glob(path))
        else:
            found = [path] if is_remote or files.exists(path) else []
        if not found:
            raise UsageError(f"There are no shards {url!r}.")
        for name in found:
            yield str(files.unstrip_protocol(name)) if is_remote else str(name)


def expand_braces(pattern: str) -> list[str]:
    """Return ``{a,b}`` and ``{000..012}`` spelled out, as a shell does; zeros in front are kept."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    if number := _RANGE.fullmatch(inner):
        first, last = number.groups()
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = inner.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for choice in choices for expanded in expand_braces(head + choice + tail)]
