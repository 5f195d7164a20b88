"""``HubStream``: streamed data sets of the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

from finetune.data_files.streaming import FIRST_RECORDS, Streamed, buffer_shuffled
from finetune.data_files.tables import arrow_errors
from finetune.sample import DataError

_ROWS = 16


class HubStream:
    """Rows of streamed data sets, sharded across readers (dataloader workers of all ranks).

    In every pass the files of a data set are assigned to the readers; with fewer files than readers, every reader reads
    all rows and keeps each n-th. The shuffle buffer is ours, since the state that the library saves does not contain
    the rows in its own buffer.

    Args:
        rows: iterable data sets of the library.
        names: name of each, for messages.
        seed: random seed of all orders.
        buffer_size: size of the shuffle buffer, per reader and data set.
    """

    def __init__(self, rows: Sequence[Any], names: Sequence[str], *, seed: int = 0, buffer_size: int = 16384) -> None:
        self.names, self.seed, self.buffer_size = list(names), seed, buffer_size
        self._rows = list(rows)

    @property
    def state(self) -> str:
        """Text that changes whenever the order of rows changes, except by the number of readers."""
        return json.dumps([self.seed, self.buffer_size, self.names, [rows.num_shards for rows in self._rows]])

    def head(self, which: int = 0, limit: int = FIRST_RECORDS) -> list[Streamed]:
        """The first rows of a data set.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        files = range(self._rows[which].num_shards)
        found = list(islice(chain.from_iterable(self._read(which, file) for file in files), limit))
        if not found:
            raise DataError(f"{self.names[which]}: holds no record; training needs at least one")
        return found

    def endless(self, reader: int, readers: int) -> Iterator[Streamed]:
        """The records of one reader, in endless passes."""
        for number in count():
            yield from self.one_pass(number, reader, readers)

    def one_pass(self, number: int, reader: int, readers: int) -> Iterator[Streamed]:
        """The records of one reader in a pass, interleaved at random from all data sets."""
        rng = random.Random(f"{self.seed} {number} {reader} {readers}")
        order = random.Random(f"{self.seed} {number}")
        shares = [self._share(which, order, reader, readers) for which in range(len(self._rows))]
        open_ones = [buffer_shuffled(share, self.buffer_size, rng) for share in shares]
        while open_ones:
            chosen = rng.choice(open_ones)
            row = next(chosen, None)
            if row is None:
                open_ones.remove(chosen)
            else:
                yield row

    def _share(self, which: int, order: random.Random, reader: int, readers: int) -> Iterator[Streamed]:
        """The rows of a data set that a reader gets in a pass; the order of files is the same for all readers."""
        files = list(range(self._rows[which].num_shards))
        order.shuffle(files)
        many = len(files) >= readers
        mine = files[reader::readers] if many else files
        found = chain.from_iterable(self._read(which, file) for file in mine)
        return found if many else islice(found, reader, None, readers)

    def _read(self, which: int, file: int) -> Iterator[Streamed]:
        """The rows of a file. ``iter`` avoids the library's own sharding by dataloader worker."""
        from datasets.exceptions import DatasetsError

        rows, name, at = self._rows[which], f"{self.names[which]}, file {file}", 0
        try:
            for batch in rows.shard(rows.num_shards, file).iter(batch_size=_ROWS):
                for values in zip(*batch.values(), strict=True):
                    yield Streamed(name, at, dict(zip(batch, values, strict=True)), which)
                    at += 1
        except (DatasetsError, *arrow_errors(), OSError, ValueError) as error:
            raise DataError(f"{name}, row {at}: cannot be read ({error}); try again, or download it") from error
