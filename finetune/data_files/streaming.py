"""Records of files read from front to back, each by one of several readers, in a mixed order."""

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
from finetune.data_files.json_file import COMPRESSED, open_front_to_back
from finetune.data_files.json_values import ValueFault, parse
from finetune.data_files.records import data_files, kind_of
from finetune.data_files.tables import present
from finetune.data_files.webdataset import SHARD, of_row, read_shard, value_of
from finetune.sample import DataError, Source

HEAD = 1_000
"""Records at the beginning that are looked at before training."""

# Larger pieces only make the order less mixed. A reader has several in every pass: then all have about as much to do.
_PIECE = 1 << 26
_PIECES_PER_READER = 16
# Rows of Parquet that are decoded at once.
_ROWS = 64
_BOM = b"\xef\xbb\xbf"


class ShardPiece(NamedTuple):
    """Part of a file that one reader reads.

    Attributes:
        file: the file.
        start: first byte of JSON Lines, where lines that begin in the piece belong to it; first row of Parquet.
        stop: byte or row behind the last.
        group: row group of Parquet; -1 in JSON Lines.
        skip: rows of the group before the piece.
        which: number of its path in the stream.
    """

    file: Path
    start: int
    stop: int
    group: int = -1
    skip: int = 0
    which: int = 0


@dataclass(frozen=True, slots=True)
class Streamed:
    """A record that has been read and not yet parsed; many of them wait in a buffer.

    Attributes:
        file: where it stands; a name where it is no file of this machine.
        at: first byte of its line or files, number of its row in Parquet.
        data: its line, its columns, or its files in a shard.
        which: number of its path in the stream.
    """

    file: Path | str
    at: int
    data: bytes | dict[str, Any]
    which: int = 0

    def source(self) -> Source:
        """Where it stands, whether or not it can be parsed."""
        if isinstance(self.file, str):
            return Source(self.file, self.at, unit="row")
        return Source(str(self.file), self.at, unit="byte" if isinstance(self.data, bytes) else "record")

    def parse(self) -> Any:
        """The record as plain Python values.

        Raises:
            DataError: its line is not JSON, or the files of a shard make no record.
        """
        if isinstance(self.data, dict):
            return present(self.data) if isinstance(self.file, Path) else of_row(present(self.data), str(self.source()))
        assert isinstance(self.file, Path)
        if kind_of(self.file) == SHARD:
            return value_of(self.data, str(self.source()))
        try:
            return parse(self.data)
        except ValueFault as error:
            raise DataError(f"{self.source()}: {error}") from error
        except UnicodeDecodeError as error:
            with open_front_to_back(self.file) as file:
                raise not_utf8(self.file, self.at + error.start, file) from error
        except json.JSONDecodeError as error:
            with open_front_to_back(self.file) as file:
                raise explain_line(
                    self.file, file, self.at, self.at + len(self.data.rstrip(b"\n")), alone=self.at <= len(_BOM)
                ) from error


class Stream:
    """Data files, or folders of files of one kind, read from front to back.

    Files are cut into pieces without reading them: JSON Lines by bytes, Parquet by row groups and rows; compressed
    lines and shards are a piece each. In every pass
    the pieces are dealt to the readers in an order that all of them know, so that together they read every record
    exactly once; each draws its records at random from a buffer. The next pass has another order.

    Args:
        paths: the files or folders.
        seed: of all orders.
        buffer_size: records that a reader draws from.

    Raises:
        DataError: a file is missing, of another kind, or a JSON array; or there is no record.
    """

    def __init__(self, paths: Sequence[Path], *, seed: int = 0, buffer_size: int = 16384) -> None:
        self.paths, self.seed, self.buffer_size = list(paths), seed, buffer_size
        self._parts = [part for which, path in enumerate(paths) for part in _parts(path, which)]

    @property
    def state(self) -> str:
        """All that decides which records come when, as text that changes with it; but not the number of readers."""
        sizes = [[part.file.name, *part.sizes] for part in self._parts]
        return json.dumps([self.seed, self.buffer_size, zlib.crc32(json.dumps(sizes).encode())])

    def head(self, which: int = 0, limit: int = HEAD) -> list[Streamed]:
        """The first records of a path.

        Raises:
            DataError: there is none.
        """
        pieces = [piece for piece in self._pieces(1) if piece.which == which]
        found = list(islice(chain.from_iterable(map(_read, pieces)), limit))
        if not found:
            raise DataError(f"{self.paths[which]}: holds no record; training needs at least one")
        return found

    def endless(self, reader: int, readers: int) -> Iterator[Streamed]:
        """What one of several readers reads in pass after pass."""
        for number in count():
            yield from self.one_pass(number, reader, readers)

    def one_pass(self, number: int, reader: int, readers: int) -> Iterator[Streamed]:
        """What one of several readers reads in a pass."""
        pieces = self._pieces(readers)
        # Of fewer pieces than readers each reader gets one in some pass: none waits for ever.
        dealt = list(range(max(len(pieces), readers)))
        random.Random(f"{self.seed} {number}").shuffle(dealt)
        mine = [pieces[place] for place in dealt[reader::readers] if place < len(pieces)]
        chance = random.Random(f"{self.seed} {number} {reader} {readers}")
        yield from drawn(chain.from_iterable(map(_read, mine)), self.buffer_size, chance)

    def _pieces(self, readers: int) -> list[ShardPiece]:
        wanted = readers * _PIECES_PER_READER
        texts = sum(sum(part.sizes) for part in self._parts if not part.groups)
        groups = sum(len(part.sizes) for part in self._parts if part.groups)
        size = max(min(texts // wanted, _PIECE), 1)
        cuts = -(-wanted // max(groups, 1))
        return [piece for part in self._parts for piece in (_rows(part, cuts) if part.groups else _ranges(part, size))]


def drawn(records: Iterable[Streamed], size: int, chance: random.Random) -> Iterator[Streamed]:
    """All of the records, each drawn at random from so many that have been read."""
    buffer: list[Streamed] = []
    for record in records:
        if len(buffer) < size:
            buffer.append(record)
        else:
            place = chance.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = record
    chance.shuffle(buffer)
    yield from buffer


class _Part(NamedTuple):
    """A file of a stream: its bytes, or the rows of its row groups."""

    file: Path
    which: int
    groups: bool
    sizes: list[int]


def _parts(path: Path, which: int) -> Iterator[_Part]:
    for file in data_files(path):
        _check_kind(file)
        groups = file.suffix.lower() == ".parquet"
        yield _Part(file, which, groups, _rows_of_groups(file) if groups else [file.stat().st_size])


def _ranges(part: _Part, size: int) -> Iterator[ShardPiece]:
    end = part.sizes[0]
    if _is_whole(part.file):
        yield ShardPiece(part.file, 0, sys.maxsize, which=part.which)
        return
    for at in range(0, end, size):
        yield ShardPiece(part.file, at, min(at + size, end), which=part.which)


def _rows(part: _Part, cuts: int) -> Iterator[ShardPiece]:
    """The row groups of a Parquet file, each cut into so many pieces."""
    first = 0
    for group, rows in enumerate(part.sizes):
        size = max(-(-rows // cuts), 1)
        for at in range(0, rows, size):
            yield ShardPiece(part.file, first + at, first + min(at + size, rows), group, at, part.which)
        first += rows


def _read(piece: ShardPiece) -> Iterator[Streamed]:
    if kind_of(piece.file) == SHARD:
        return (Streamed(piece.file, at, data, piece.which) for at, data in read_shard(piece.file))
    return _read_lines(piece) if piece.group < 0 else _read_rows(piece)


def _is_whole(file: Path) -> bool:
    """Whether it can only be read from its beginning."""
    return kind_of(file) == SHARD or file.suffix.lower() == COMPRESSED


def _read_lines(piece: ShardPiece) -> Iterator[Streamed]:
    with open_front_to_back(piece.file) as file:
        if piece.start:
            # The line that begins before the piece belongs to the one before, unless it ends just there.
            file.seek(piece.start - 1)
            file.readline()
        elif file.read(len(_BOM)) != _BOM:
            file.seek(0)
        at = file.tell()
        while at < piece.stop and (line := file.readline()):
            if line.strip():
                yield Streamed(piece.file, at, line, piece.which)
            at += len(line)


def _read_rows(piece: ShardPiece) -> Iterator[Streamed]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(piece.file) as file:
            skip, number = piece.skip, piece.start
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[piece.group]):
                for row in batch.slice(skip, piece.stop - number).to_pylist():
                    yield Streamed(piece.file, number, row, piece.which)
                    number += 1
                if number == piece.stop:
                    return
                skip = max(skip - len(batch), 0)
    except ArrowException as error:
        raise DataError(f"{piece.file}, row group {piece.group}: cannot be read as parquet: {error}") from error


def _check_kind(file: Path) -> None:
    """Makes sure that a file can be read from front to back."""
    kind = kind_of(file)
    if kind in (".parquet", SHARD):
        return
    if kind != ".json":
        raise DataError(
            f"{file}: --streaming true reads JSON Lines, Parquet and shards (.tar); convert it, "
            "or leave --streaming out"
        )
    try:
        with open_front_to_back(file) as opened:
            start = opened.read(1 << 16).removeprefix(_BOM).lstrip()[:1]
    except (OSError, EOFError) as error:
        raise unreadable(file, error if isinstance(error, OSError) else OSError(str(error))) from error
    if start == b"[":
        raise DataError(
            f"{file}: a JSON array cannot be read from the middle, as --streaming true does; make JSON Lines of it "
            f"(jq -c '.[]' {file.name} > {file.stem}.jsonl), or leave --streaming out"
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
