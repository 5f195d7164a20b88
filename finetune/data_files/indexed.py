"""Files whose records are found once, noted in an index, and read one by one when they are asked for."""

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

# What the index of a smaller file saves is not worth a file of its own.
_SMALL = 1 << 20
_MAGIC = b"mcpvidx2"
# Magic, state of the data file, number of records; behind it first byte and end of each record.
_HEADER = struct.Struct("=8sqqQqq")
_SPAN = struct.Struct("=qq")


class IndexedRecords(Sequence[Any]):
    """Records that stand at known places of a file.

    When a file is opened for the first time, each record is looked at once and its place is noted in an index in the
    cache folder, which counts as long as path and state of the file (``cache.signature``) stay the same. Later only
    the records asked for are read; should one not be where the index says, it is made anew. Both files are read at
    offsets rather than mapped: no memory grows with them, and a data file that is cut short while it is open gives an
    error instead of ending the process. Processes may share an object; a pickled one opens its file again.

    Args:
        path: the data file.
        rebuild: make the index anew.

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
            DataError: the file has changed since it was opened, or the record cannot be taken.
        """
        number = range(len(self))[index]
        try:
            try:
                return self._record(number)
            except MisplacedError:
                # It was valid when the index was made.
                self._renew(number)
                return self._record(number)
        except OSError as error:
            raise unreadable(self._path, error) from error

    @staticmethod
    def _open(path: Path) -> BinaryIO:
        """The file in which the records stand."""
        return path.open("rb")

    @staticmethod
    @abstractmethod
    def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
        """First byte and end of every record, two numbers per record, as many at a time as is convenient."""

    @abstractmethod
    def _value(self, data: bytes, number: int) -> Any:
        """The record of some bytes.

        Raises:
            MisplacedError: there is none; the index may not fit.
            DataError: it cannot be taken.
        """

    def _record(self, number: int) -> Any:
        start, end = self._index.span(number)
        return self._value(os.pread(self._file.fileno(), end - start, start), number)

    def _renew(self, number: int) -> None:
        """Makes an index anew that does not fit its file.

        Raises:
            DataError: the file has changed since it was opened.
        """
        count = len(self)
        if _state(self._file) == self._opened_as:
            self._index = _open_index(self._path, self._file, self._scan, rebuild=True)
            logger.warning("%s: the index did not fit the file and was made anew", self._path)
            if len(self) == count:
                return
        raise DataError(f"{self._path}, record {number}: the file has changed during the run; start again")


class MisplacedError(Exception):
    """There is no record where the index says."""


def _reopen(kind: type[IndexedRecords], resolved: Path, state: State, path: Path) -> IndexedRecords:
    """A pickled object in another process, which must find the same records."""
    records = kind(resolved)
    records._path = path
    if _state(records._file) != state:
        raise DataError(f"{path}: the file has changed during the run; start again")
    return records


class _MemoryIndex:
    def __init__(self, spans: array[int]) -> None:
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans) // 2

    def span(self, index: int) -> tuple[int, int]:
        """First byte and end of a record."""
        return self._spans[2 * index], self._spans[2 * index + 1]


class _FileIndex:
    def __init__(self, file: BinaryIO, count: int) -> None:
        self._file, self._count = file, count
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return self._count

    def span(self, index: int) -> tuple[int, int]:
        """First byte and end of a record."""
        data = os.pread(self._file.fileno(), _SPAN.size, _HEADER.size + _SPAN.size * index)
        start, end = _SPAN.unpack(data)
        return start, end


def _open_index(path: Path, file: BinaryIO, scan: Scan, *, rebuild: bool) -> _MemoryIndex | _FileIndex:
    """The index of a data file: that of the cache, or a new one."""
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
    """The index in the cache when it is of this state of the data file."""
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
    """Puts a new index into the cache; False when the cache cannot be written, which is no reason to stop."""
    state = _state(file)
    logger.info("%s: finding the records (%.1f GB); this is done once", path, state[1] / 1e9)
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
        logger.warning("the index of %s is not kept: %s", path, error)
        return False
    return True


def _state(file: BinaryIO) -> State:
    return cache.state_of(os.fstat(file.fileno()))
