"""``Stream``: sequential reading of files for ``--streaming``, sharded across readers, with a shuffle buffer.

A reader is one dataloader worker of one rank.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data_files.json_errors import explain_line, not_utf8, unreadable
from finetune.data_files.json_file import COMPRESSED, open_sequential
from finetune.data_files.json_values import ValueFault, parse
from finetune.data_files.records import data_files, kind_of
from finetune.data_files.tables import present
from finetune.data_files.webdataset import SHARD, of_row, read_shard, value_of
from finetune.sample import DataError, Source
from finetune.utils.errors import located

FIRST_RECORDS = 1_000
"""Number of records at the start that are checked before training."""

# Maximum bytes of a chunk: larger ones mix the order less. Several chunks per reader and pass balance the work.
_CHUNK_BYTES = 1 << 26
_CHUNKS_PER_READER = 16
# Rows of Parquet that are decoded at once.
_ROWS = 64
_BOM = b"\xef\xbb\xbf"


class FileChunk(NamedTuple):
    """A part of a file that one reader reads.

    Attributes:
        file: the file.
        start: first byte in JSON Lines (lines that start in the chunk belong to it); first row in Parquet.
        stop: end, byte or row.
        group: row group of Parquet; -1 in JSON Lines.
        skip: rows of the row group before the chunk.
        which: index of its path in the stream.
    """

    file: Path
    start: int
    stop: int
    group: int = -1
    skip: int = 0
    which: int = 0


@dataclass(frozen=True, slots=True)
class Streamed:
    """A record that has been read but not parsed.

    Attributes:
        file: its file; a name for data sets of the hub.
        at: offset of its line or shard members in bytes, row number in Parquet.
        data: its line, its columns, or the bytes of its shard members.
        which: index of its path in the stream.
    """

    file: Path | str
    at: int
    data: bytes | dict[str, Any]
    which: int = 0

    def source(self) -> Source:
        """File and position of the record, also of an invalid one."""
        if isinstance(self.file, str):
            return Source(self.file, self.at, unit="row")
        return Source(str(self.file), self.at, unit="byte" if isinstance(self.data, bytes) else "record")

    def parse(self) -> Any:
        """The record as plain Python values.

        Raises:
            DataError: its line is not JSON, or its shard members are not a record.
        """
        if isinstance(self.data, dict):
            return present(self.data) if isinstance(self.file, Path) else of_row(present(self.data), self.source())
        assert isinstance(self.file, Path)
        if kind_of(self.file) == SHARD:
            with located(self.source()):
                return value_of(self.data)
        try:
            return parse(self.data)
        except ValueFault as error:
            raise DataError(f"{self.source()}: {error}") from error
        except UnicodeDecodeError as error:
            with open_sequential(self.file) as file:
                raise not_utf8(self.file, self.at + error.start, file) from error
        except json.JSONDecodeError as error:
            with open_sequential(self.file) as file:
                raise explain_line(
                    self.file, file, self.at, self.at + len(self.data.rstrip(b"\n")), alone=self.at <= len(_BOM)
                ) from error


class Stream:
    """Data files, or folders of files of one type, read sequentially.

    Files are divided into chunks without reading them: JSON Lines by bytes, Parquet by row groups and rows; compressed
    files and shards are one chunk each. In every pass the chunks are shuffled with a common seed and assigned to the
    readers, so that together they read every record once; each reader has a shuffle buffer. Every pass has another
    order.

    Args:
        paths: the files or folders.
        seed: random seed of all orders.
        buffer_size: size of the shuffle buffer of a reader.

    Raises:
        DataError: a file is missing, of an unsupported type, or a JSON array; or there is no record.
    """

    def __init__(self, paths: Sequence[Path], *, seed: int = 0, buffer_size: int = 16384) -> None:
        self.paths, self.seed, self.buffer_size = list(paths), seed, buffer_size
        self._parts = [part for which, path in enumerate(paths) for part in _parts(path, which)]

    @property
    def state(self) -> str:
        """Text that changes whenever the order of records changes, except by the number of readers."""
        sizes = [[part.file.name, *part.sizes] for part in self._parts]
        return json.dumps([self.seed, self.buffer_size, zlib.crc32(json.dumps(sizes).encode())])

    def head(self, which: int = 0, limit: int = FIRST_RECORDS) -> list[Streamed]:
        """The first records of a path.

        Raises:
            DataError: there is none.
        """
        chunks = [chunk for chunk in self._chunks(1) if chunk.which == which]
        found = list(islice(chain.from_iterable(map(_read, chunks)), limit))
        if not found:
            raise DataError(f"{self.paths[which]}: holds no record; training needs at least one")
        return found

    def endless(self, reader: int, readers: int) -> Iterator[Streamed]:
        """The records of one reader, in endless passes."""
        for number in count():
            yield from self.one_pass(number, reader, readers)

    def one_pass(self, number: int, reader: int, readers: int) -> Iterator[Streamed]:
        """The records of one reader in a pass."""
        chunks = self._chunks(readers)
        # With fewer chunks than readers every reader gets one in some pass, so that none blocks forever.
        order = list(range(max(len(chunks), readers)))
        random.Random(f"{self.seed} {number}").shuffle(order)
        mine = [chunks[place] for place in order[reader::readers] if place < len(chunks)]
        rng = random.Random(f"{self.seed} {number} {reader} {readers}")
        yield from buffer_shuffled(chain.from_iterable(map(_read, mine)), self.buffer_size, rng)

    def _chunks(self, readers: int) -> list[FileChunk]:
        wanted = readers * _CHUNKS_PER_READER
        texts = sum(sum(part.sizes) for part in self._parts if not part.groups)
        groups = sum(len(part.sizes) for part in self._parts if part.groups)
        size = max(min(texts // wanted, _CHUNK_BYTES), 1)
        cuts = -(-wanted // max(groups, 1))
        return [chunk for part in self._parts for chunk in (_rows(part, cuts) if part.groups else _ranges(part, size))]


def buffer_shuffled(records: Iterable[Streamed], size: int, rng: random.Random) -> Iterator[Streamed]:
    """The records in random order, shuffled with a buffer of this size."""
    buffer: list[Streamed] = []
    for record in records:
        if len(buffer) < size:
            buffer.append(record)
        else:
            place = rng.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = record
    rng.shuffle(buffer)
    yield from buffer


class _Part(NamedTuple):
    """A file of a stream: its size in bytes, or the number of rows of its row groups."""

    file: Path
    which: int
    groups: bool
    sizes: list[int]


def _parts(path: Path, which: int) -> Iterator[_Part]:
    for file in data_files(path):
        _check_kind(file)
        groups = file.suffix.lower() == ".parquet"
        yield _Part(file, which, groups, _rows_of_groups(file) if groups else [file.stat().st_size])


def _ranges(part: _Part, size: int) -> Iterator[FileChunk]:
    end = part.sizes[0]
    if _is_whole(part.file):
        yield FileChunk(part.file, 0, sys.maxsize, which=part.which)
        return
    for at in range(0, end, size):
        yield FileChunk(part.file, at, min(at + size, end), which=part.which)


def _rows(part: _Part, cuts: int) -> Iterator[FileChunk]:
    """The row groups of a Parquet file, each divided into ``cuts`` chunks."""
    first = 0
    for group, rows in enumerate(part.sizes):
        size = max(-(-rows // cuts), 1)
        for at in range(0, rows, size):
            yield FileChunk(part.file, first + at, first + min(at + size, rows), group, at, part.which)
        first += rows


def _read(chunk: FileChunk) -> Iterator[Streamed]:
    if kind_of(chunk.file) == SHARD:
        return (Streamed(chunk.file, at, data, chunk.which) for at, data in read_shard(chunk.file))
    return _read_lines(chunk) if chunk.group < 0 else _read_rows(chunk)


def _is_whole(file: Path) -> bool:
    """Whether it can only be read from its start."""
    return kind_of(file) == SHARD or file.suffix.lower() == COMPRESSED


def _read_lines(chunk: FileChunk) -> Iterator[Streamed]:
    with open_sequential(chunk.file) as file:
        if chunk.start:
            # A line that starts before the chunk belongs to the previous chunk.
            file.seek(chunk.start - 1)
            file.readline()
        elif file.read(len(_BOM)) != _BOM:
            file.seek(0)
        at = file.tell()
        while at < chunk.stop and (line := file.readline()):
            if line.strip():
                yield Streamed(chunk.file, at, line, chunk.which)
            at += len(line)


def _read_rows(chunk: FileChunk) -> Iterator[Streamed]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(chunk.file) as file:
            skip, number = chunk.skip, chunk.start
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[chunk.group]):
                for row in batch.slice(skip, chunk.stop - number).to_pylist():
                    yield Streamed(chunk.file, number, row, chunk.which)
                    number += 1
                if number == chunk.stop:
                    return
                skip = max(skip - len(batch), 0)
    except ArrowException as error:
        raise DataError(f"{chunk.file}, row group {chunk.group}: cannot be read as parquet: {error}") from error


def _check_kind(file: Path) -> None:
    """Checks that a file can be streamed."""
    kind = kind_of(file)
    if kind in (".parquet", SHARD):
        return
    if kind != ".json":
        raise DataError(
            f"{file}: --streaming true supports JSON Lines, Parquet and WebDataset shards (.tar); convert it, "
            "or remove --streaming"
        )
    try:
        with open_sequential(file) as opened:
            start = opened.read(1 << 16).removeprefix(_BOM).lstrip()[:1]
    except (OSError, EOFError) as error:
        raise unreadable(file, error if isinstance(error, OSError) else OSError(str(error))) from error
    if start == b"[":
        raise DataError(
            f"{file}: a JSON array cannot be streamed (--streaming true); convert it to JSON Lines "
            f"(jq -c '.[]' {file.name} > {file.stem}.jsonl), or remove --streaming"
        )


def _rows_of_groups(file: Path) -> list[int]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as opened:
            return [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
    except OSError as error:
        raise unreadable(file, error) from error
    except ArrowException as error:
        raise DataError(f"{file}: cannot be read as parquet: {error}") from error
