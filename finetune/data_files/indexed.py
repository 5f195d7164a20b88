"""``IndexedRecords``: random access to the records of a file through a cached index of byte offsets."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data_files.json_errors import unreadable
from finetune.sample import DataError
from finetune.utils import cache

logger = logging.getLogger(__name__)

State = tuple[int, int, int, int]
Scan = Callable[[Path, BinaryIO], "Iterator[array[int]]"]

# Smaller files are indexed in memory only.
_SMALL = 1 << 20
_MAGIC = b"mcpvidx2"
# Magic, state of the data file, number of records; then (start, end) of each record.
_HEADER = struct.Struct("=8sqqQqq")
_SPAN = struct.Struct("=qq")


class IndexedRecords(Sequence[Any]):
    """The records of a file, read on access.

    When a file is opened for the first time it is scanned, and the offsets of its records are written to an index in
    the cache folder, valid while path and state of the file (``cache.signature``) do not change. If a record is not
    where the index says, the index is rebuilt. Files are read with pread, not memory-mapped: memory use is constant,
    and truncating an open data file gives an error instead of SIGBUS. Processes may share an object; a pickled one
    reopens its file.

    Args:
        path: the data file.
        rebuild: rebuild the index.

    Raises:
        DataError: the file is missing or not of its kind (with the place and the cause), or holds no record.
    """

    def __init__(self, path: Path, *, rebuild: bool = False) -> None:
        self._path = path
        try:
            self._file = self._open(path)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
        weakref.finalize(self, self._file.close)
        self._opened_as = _state(self._file)
        self._index = _open_index(path, self._file, self._scan, rebuild=rebuild)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self._path.resolve(), _state(self._file), self._path)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record at ``index``, as plain Python values.

        Raises:
            DataError: the file has changed since it was opened, or the record cannot be used.
        """
        number = range(len(self))[index]
        try:
            try:
                return self._record(number)
            except MisplacedError:
                # It was valid when the index was built.
                self._renew(number)
                return self._record(number)
        except OSError as error:
            raise unreadable(self._path, error) from error

    @staticmethod
    def _open(path: Path) -> BinaryIO:
        """Opens the file with the records."""
        return path.open("rb")

    @staticmethod
    @abstractmethod
    def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
        """Yields (start, end) offsets of every record, two numbers per record, in arrays of any length."""

    @abstractmethod
    def _value(self, data: bytes, number: int) -> Any:
        """Parses the bytes of a record.

        Raises:
            MisplacedError: not a record; the index may be outdated.
            DataError: it cannot be used.
        """

    def _record(self, number: int) -> Any:
        start, end = self._index.span(number)
        return self._value(os.pread(self._file.fileno(), end - start, start), number)

    def _renew(self, number: int) -> None:
        """Rebuilds an index that does not match its file.

        Raises:
            DataError: the file has changed since it was opened.
        """
        count = len(self)
        if _state(self._file) == self._opened_as:
            self._index = _open_index(self._path, self._file, self._scan, rebuild=True)
            logger.warning("%s: the index did not match the file and was rebuilt", self._path)
            if len(self) == count:
                return
        raise DataError(f"{self._path}, record {number}: the file has changed during the run; restart it")


class MisplacedError(Exception):
    """There is no record where the index says."""


def _reopen(kind: type[IndexedRecords], resolved: Path, state: State, path: Path) -> IndexedRecords:
    """Reopens a pickled object in another process and checks that the file is unchanged."""
    records = kind(resolved)
    records._path = path
    if _state(records._file) != state:
        raise DataError(f"{path}: the file has changed during the run; restart it")
    return records


class _MemoryIndex:
    def __init__(self, spans: array[int]) -> None:
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans) // 2

    def span(self, index: int) -> tuple[int, int]:
        """(start, end) offsets of a record."""
        return self._spans[2 * index], self._spans[2 * index + 1]


class _FileIndex:
    def __init__(self, file: BinaryIO, count: int) -> None:
        self._file, self._count = file, count
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return self._count

    def span(self, index: int) -> tuple[int, int]:
        """(start, end) offsets of a record."""
        data = os.pread(self._file.fileno(), _SPAN.size, _HEADER.size + _SPAN.size * index)
        start, end = _SPAN.unpack(data)
        return start, end


def _open_index(path: Path, file: BinaryIO, scan: Scan, *, rebuild: bool) -> _MemoryIndex | _FileIndex:
    """The index of a data file, from the cache or rebuilt."""
    state = _state(file)
    if state[1] >= _SMALL:
        place = cache.folder() / f"index-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.bin"
        known = None if rebuild else _known(place, state)
        if known is None and _write(place, path, file, scan):
            known = _known(place, state)
        if known is not None:
            return known
    spans: array[int] = array("q")
    for some in scan(path, file):
        spans.extend(some)
    return _MemoryIndex(spans)


def _known(place: Path, state: State) -> _FileIndex | None:
    """The cached index if it matches the state of the data file."""
    try:
        file = place.open("rb")
    except OSError:
        return None
    header = file.read(_HEADER.size)
    if len(header) == _HEADER.size:
        magic, *noted, count = _HEADER.unpack(header)
        whole = os.fstat(file.fileno()).st_size == _HEADER.size + _SPAN.size * count
        if (magic, *noted) == (_MAGIC, *state) and whole:
            return _FileIndex(file, count)
    file.close()
    return None


def _write(place: Path, path: Path, file: BinaryIO, scan: Scan) -> bool:
    """Writes a new index to the cache; False if the cache is not writable."""
    state = _state(file)
    logger.info("%s: indexing the records (%.1f GB); done once per file", path, state[1] / 1e9)
    try:
        with cache.atomic_write(place) as target:
            target.write(bytes(_HEADER.size))
            count = 0
            for spans in scan(path, file):
                target.write(spans)
                count += len(spans) // 2
            target.seek(0)
            target.write(_HEADER.pack(_MAGIC, *state, count))
    except OSError as error:
        logger.warning("the index of %s is not cached: %s", path, error)
        return False
    return True


def _state(file: BinaryIO) -> State:
    return cache.state_of(os.fstat(file.fileno()))
