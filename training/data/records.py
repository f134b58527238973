"""Pictures in a fixed order, once through: what is evaluated and what control maps are precomputed from."""

from __future__ import annotations

from collections.abc import Iterator

from icexport.errors import UsageError
from training.data.config import DataConfig
from training.data.pictures import BrokenPictureError
from training.data.samples import BROKEN, Counts, Fault, Record, Sample, read
from training.data.shards import Shards
from training.data.table import open_table

__all__ = ["Record", "Records", "records"]


class Records:
    """The readable pictures of a data set, in its order, cut in the middle and not mirrored. `records` makes it.

    Attributes:
        length: number of pictures, broken ones included; None: not known.
        counts: broken pictures and missing captions met so far.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._source = Shards(config) if config.is_shards else open_table(config)
        self.length = None if isinstance(self._source, Shards) else len(self._source)
        self.counts = Counts()

    def __iter__(self) -> Iterator[Record]:
        """Yield all pictures, read one at a time.

        Raises:
            UsageError: no picture could be read; raised at the end.
        """
        readable = False
        for sample in self.samples():
            if record := self.read(sample):
                readable = True
                yield record
        if not readable:
            raise UsageError(f"None of the {len(self.counts.broken)} pictures of {self._config.source!r} can be read.")

    def samples(self) -> Iterator[Sample]:
        """Yield what is in the data set, not yet decoded."""
        for item in self._source:
            if isinstance(item, Fault):
                self.counts.add(item)
            else:
                yield item

    def read(self, sample: Sample) -> Record | None:
        """Return one picture; None, and counted, if it cannot be read."""
        try:
            record = read(sample, self._config, None)
        except BrokenPictureError as error:
            self.counts.add(Fault(BROKEN, sample.id, str(error)))
            return None
        for fault in record.faults:
            self.counts.add(fault)
        return record


def records(config: DataConfig) -> Records:
    """Open a data set for evaluation. ``random-crop`` is ``crop``; ``flip``, ``shuffle`` and ``workers`` do nothing.

    Raises:
        UsageError: the data set cannot be opened, is empty, or lacks a column.
    """
    return Records(config)
