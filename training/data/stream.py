"""Endless batches from shards, shared out among processes and their workers, that go on where they stopped.

Samples are read in blocks of ``shuffle_buffer``. Where a block starts says everything about it, its shuffled order
too: a place in the stream is a handful of numbers, and resuming reads one block again. (A rolling shuffle buffer mixes
a little further, but would have to be saved with its contents.)
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from icexport.errors import UsageError
from training.data.config import DataConfig
from training.data.parcel import Parcel, pack
from training.data.pictures import BrokenPictureError
from training.data.samples import BROKEN, HOPELESS, Fault, Record, Sample, read
from training.data.shards import Shards


@dataclass(frozen=True)
class Cursor:
    """A place in a reader's endless stream, always right after a record (or at the very beginning).

    Attributes:
        epoch: number of the epoch of this reader.
        everything: whether this reader reads all shards, because its share of the epoch had nothing readable.
        shard: position of the shard in the share, where the block starts.
        sample: number of the sample in the shard, where the block starts.
        taken: how many samples of the block are used up.
    """

    epoch: int = 0
    everything: bool = False
    shard: int = 0
    sample: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Reader:
    """One of ``count`` processes that share out the shards: every worker of every training process is one.

    In an epoch no two readers get the same sample. With as many shards as readers or more, a reader gets whole shards;
    else several readers read a shard and take turns with its samples. Only a reader whose share has nothing readable,
    as there is so little data, reads what others read.
    """

    shards: Shards
    config: DataConfig
    seed: int
    index: int
    count: int

    def records(self, cursor: Cursor) -> Iterator[tuple[Cursor, Record | Fault]]:
        """Yield everything from ``cursor`` on, without end, each with the place after it.

        Raises:
            UsageError: nothing in the shards can be read.
        """
        in_a_row = 0
        while True:
            readable = cursor != Cursor(cursor.epoch, cursor.everything)
            for start, block in self._blocks(cursor):
                for taken in range(start.taken, len(block)):
                    item = self._read(start, block[taken])
                    readable, in_a_row = (True, 0) if isinstance(item, Record) else (readable, in_a_row + 1)
                    yield replace(start, taken=taken + 1), item
                    if in_a_row == HOPELESS:
                        raise UsageError(f"None of {HOPELESS} samples in a row of the shards can be read.")
            if not readable and cursor.everything:
                raise UsageError(f"Nothing in the {len(self.shards.urls)} shards can be read; see the warnings above.")
            cursor = Cursor(cursor.epoch + 1) if readable else Cursor(cursor.epoch, everything=True)

    def _read(self, start: Cursor, item: Sample | Fault) -> Record | Fault:
        if isinstance(item, Fault):
            return item
        try:
            rng = np.random.default_rng([self.seed, start.epoch, zlib.crc32(item.id.encode())])
            return read(item, self.config, rng)
        except BrokenPictureError as error:
            return Fault(BROKEN, item.id, str(error))

    def _blocks(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[Sample | Fault]]]:
        """Yield the blocks of the epoch from that of ``cursor`` on, shuffled, and where they start."""
        share = self._share(cursor.epoch, cursor.everything)
        start, block = cursor, list[Sample | Fault]()
        for shard in range(cursor.shard, len(share)):
            url, turn, turns = share[shard]
            for number, item in enumerate(self.shards.read(url)):
                if number % turns != turn or (shard == cursor.shard and number < cursor.sample):
                    continue
                if len(block) == self.config.shuffle_buffer:
                    yield start, self._shuffled(start, block)
                    start, block = replace(cursor, shard=shard, sample=number, taken=0), []
                block.append(item)
        yield start, self._shuffled(start, block)

    def _share(self, epoch: int, everything: bool) -> list[tuple[str, int, int]]:
        """Yield (shard, turn, turns): of each shard, in this order, every ``turns``-th sample from ``turn`` on."""
        urls, number = list(self.shards.urls), len(self.shards.urls)
        if self.config.shuffle:
            urls = [urls[i] for i in np.random.default_rng([self.seed, epoch]).permutation(number)]
        if everything:
            return [(url, 0, 1) for url in urls]
        if number >= self.count:
            return [(url, 0, 1) for url in urls[self.index :: self.count]]
        first, turn = self.index % number, self.index // number
        return [(urls[first], turn, len(range(first, self.count, number)))]

    def _shuffled(self, start: Cursor, block: list[Sample | Fault]) -> list[Sample | Fault]:
        if not self.config.shuffle:
            return block
        rng = np.random.default_rng([self.seed, start.epoch, self.index, start.shard, start.sample])
        return [block[i] for i in rng.permutation(len(block))]


class ShardBatches(IterableDataset):
    """The batches of one training process, for a loader whose workers take turns.

    Args:
        shards: where the samples are.
        config: how to read them.
        batch_size: number of pictures in a batch.
        seed: seed of every random choice.
        process: (rank, number of training processes).
        cursors: where each of the readers of this process goes on.
        turn: number of the reader that the next batch comes from.
    """

    def __init__(
        self,
        shards: Shards,
        config: DataConfig,
        batch_size: int,
        seed: int,
        process: tuple[int, int],
        cursors: list[Cursor],
        turn: int,
    ) -> None:
        self.shards, self.config, self.batch_size, self.seed = shards, config, batch_size, seed
        self.process, self.cursors, self.turn = process, cursors, turn

    def __iter__(self) -> Iterator[Parcel | UsageError]:
        """Yield batches without end; an error instead of a batch when nothing can be read."""
        worker = get_worker_info()
        readers = len(self.cursors)
        # A loader asks its worker 0 first: that one becomes the reader whose turn it is.
        number = ((worker.id if worker else 0) + self.turn) % readers
        rank, processes = self.process
        reader = Reader(self.shards, self.config, self.seed, rank * readers + number, processes * readers)
        records, faults = list[Record](), list[Fault]()
        try:
            for cursor, item in reader.records(self.cursors[number]):
                if isinstance(item, Fault):
                    faults.append(item)
                    continue
                records.append(item)
                if len(records) == self.batch_size:
                    yield pack(records, faults, dataclasses.asdict(cursor))
                    records, faults = [], []
        except UsageError as error:
            yield error
