"""Endless batches that go on, after a restart, with the very batch that would have come.

Nothing random comes from a generator that runs along: the order of an epoch, a place to crop, a mirror image are
functions of the seed, the epoch and the sample. A loader's place is therefore a few numbers, whatever its workers had
read ahead, and torch's own loader can be started at any of them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from icexport.errors import UsageError
from training.data.config import DataConfig
from training.data.parcel import Parcel, pack
from training.data.pictures import BrokenPictureError
from training.data.samples import BROKEN, HOPELESS, Counts, Fault, Record, read
from training.data.shards import Shards
from training.data.stream import Cursor, ShardBatches
from training.data.table import Table, open_table

logger = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], Tensor]
Slot = tuple[int, int]
"""(epoch, row): one picture of one batch."""


def open_data(
    config: DataConfig, tokenize: Tokenize, batch_size: int, *, rank: int = 0, processes: int = 1, seed: int = 0
) -> Batches:
    """Open a data set for training.

    Args:
        config: names the data set, and says how to cut its pictures.
        tokenize: gives the token ids int64 ``[n,S]`` of n captions; called in this process.
        batch_size: number of pictures in a batch of this process.
        rank: number of this training process.
        processes: number of training processes; in an epoch no two of them get the same picture.
        seed: seed of every random choice, 0 or more; the same in all processes.

    Raises:
        UsageError: the data set cannot be opened, is empty, or lacks a column.
    """
    if batch_size < 1 or seed < 0 or not 0 <= rank < processes:
        raise UsageError(
            f"Batches of {batch_size} with seed {seed} for process {rank} of {processes} cannot be made; expected a "
            "batch size of at least 1, a seed of at least 0, and a rank below the number of processes."
        )
    source = Shards(config) if config.is_shards else open_table(config)
    return Batches(source, config, tokenize, batch_size, rank, processes, seed)


class Batches:
    """Endless batches of one training process; `open_data` makes it.

    A batch has ``pixels`` float32 ``[B,3,H,W]`` in [0,1], ``control`` as well if the source has control maps,
    ``input_ids`` int64 ``[B,S]`` and ``ids``. Iterating again goes on after the last batch that was handed out.

    Attributes:
        counts: broken pictures and missing captions met so far, in this process since it started.
    """

    def __init__(
        self,
        source: Table | Shards,
        config: DataConfig,
        tokenize: Tokenize,
        batch_size: int,
        rank: int,
        processes: int,
        seed: int,
    ) -> None:
        self.counts = Counts()
        self._source, self._config, self._tokenize, self._batch_size = source, config, tokenize, batch_size
        self._rank, self._processes, self._seed = rank, processes, seed
        self._number = 0
        self._cursors = [Cursor()] * max(1, config.workers) if isinstance(source, Shards) else []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches from the current place on.

        Raises:
            UsageError: no picture can be read.
        """
        for parcel in self._loader():
            if isinstance(parcel, UsageError):
                raise parcel
            for fault in parcel.faults:
                self.counts.add(fault)
            if self._cursors:
                self._cursors[self._number % len(self._cursors)] = Cursor(**parcel.cursor)
            self._number += 1
            yield self._batch(parcel)

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch that was handed out, JSON-able."""
        cursors = [dataclasses.asdict(cursor) for cursor in self._cursors]
        return {"number": self._number, "cursors": cursors, "length": self._length()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that `state_dict` returned. Rank, processes, seed, batch size and data must be the same.

        Raises:
            UsageError: the place is one in another kind of source, or one of another number of workers.
        """
        if len(state["cursors"]) != len(self._cursors):
            raise UsageError(
                f"The saved place is one of {len(state['cursors']) or 'no'} stream readers, and the data set now has "
                f"{len(self._cursors) or 'none'}. Resume with the same source and, for shards, the same workers=."
            )
        if state["length"] != self._length():
            logger.warning(
                "The data set %s changed: it had %d %s when the checkpoint was written and has %d now. "
                "Training goes on, but not as the uninterrupted run.",
                self._config.source,
                state["length"],
                "shards" if self._cursors else "rows",
                self._length(),
            )
        self._number = state["number"]
        self._cursors = [Cursor(**cursor) for cursor in state["cursors"]]

    def _length(self) -> int:
        return len(self._source.urls) if isinstance(self._source, Shards) else len(self._source)

    def _loader(self) -> DataLoader:
        data: Dataset
        if isinstance(self._source, Shards):
            turn, slots = self._number % len(self._cursors), None
            process = (self._rank, self._processes)
            data = ShardBatches(
                self._source, self._config, self._batch_size, self._seed, process, list(self._cursors), turn
            )
        else:
            order = _Order(len(self._source), self._seed if self._config.shuffle else None)
            slots = _Slots(order, self._batch_size, self._rank, self._processes, self._number)
            data = _TableBatches(self._source, self._config, self._seed)
        return DataLoader(
            data,
            sampler=slots,
            batch_size=None,  # the data makes whole batches
            num_workers=self._config.workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # it draws seeds for its workers: not from the global generator
        )

    def _batch(self, parcel: Parcel) -> dict[str, Any]:
        batch = {"pixels": parcel.pixels.float().div_(255), "ids": parcel.ids}
        if parcel.control is not None:
            batch["control"] = parcel.control.float().div_(255)
        return batch | {"input_ids": self._tokenize(parcel.captions)}


class _Order:
    """The order of the rows in each epoch; ``seed`` None: as they are."""

    def __init__(self, length: int, seed: int | None) -> None:
        self._length, self._seed = length, seed
        self._epoch, self._rows = -1, np.arange(length)

    def slot(self, place: int) -> Slot:
        """Return what comes at ``place`` of the endless sequence of epochs."""
        epoch, index = divmod(place, self._length)
        if self._seed is not None and epoch != self._epoch:
            self._epoch, self._rows = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._length)
        return epoch, int(self._rows[index])


class _Slots(Sampler):
    """What goes into the batches of one process from batch ``first`` on: every ``processes``-th place of the order."""

    def __init__(self, order: _Order, batch_size: int, rank: int, processes: int, first: int) -> None:
        self._order, self._batch_size, self._rank, self._processes, self._first = (
            order,
            batch_size,
            rank,
            processes,
            first,
        )

    def __iter__(self) -> Iterator[list[Slot]]:
        place = self._first * self._batch_size * self._processes + self._rank
        while True:
            yield [self._order.slot(place + i * self._processes) for i in range(self._batch_size)]
            place += self._batch_size * self._processes


class _TableBatches(Dataset):
    """Batches by the slots that go into them."""

    def __init__(self, table: Table, config: DataConfig, seed: int) -> None:
        self._table, self._config, self._seed = table, config, seed
        # Steps of about 0.618 of the table reach every row once, and neighbours, which may be broken alike, late.
        stride = max(1, round(0.618 * len(table)))
        self._stride = next(s for s in range(stride, 2 * len(table) + 1) if math.gcd(s, len(table)) == 1)

    def __getitem__(self, slots: list[Slot]) -> Parcel | UsageError:
        """Return the batch; an error in its place when nothing can be read."""
        faults: list[Fault] = []
        try:
            return pack([self._read(epoch, row, faults) for epoch, row in slots], faults)
        except UsageError as error:
            return error

    def _read(self, epoch: int, row: int, faults: list[Fault]) -> Record:
        """Return the picture of ``row``, or the next readable one."""
        attempts = min(len(self._table), HOPELESS)
        for attempt in range(attempts):
            index = (row + attempt * self._stride) % len(self._table)
            sample = self._table.sample(index)
            try:
                return read(sample, self._config, np.random.default_rng([self._seed, epoch, index]))
            except BrokenPictureError as error:
                faults.append(Fault(BROKEN, sample.id, str(error)))
        raise UsageError(
            f"None of {attempts} pictures of {self._config.source!r} can be read; for instance {faults[-1].id}: "
            f"{faults[-1].reason}."
        )


def _unchanged(parcel: Any) -> Any:
    return parcel
