"""Random access to the records of JSON and JSON Lines files (also .gz), through a cached index of byte offsets."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from array import array
from collections.abc import Iterator
from gzip import GzipFile
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data_files.indexed import IndexedRecords, MisplacedError
from finetune.data_files.json_scan import scan
from finetune.data_files.json_values import ValueFault, parse
from finetune.sample import DataError
from finetune.utils import cache
from finetune.utils.quoting import reason

COMPRESSED = ".gz"
_BLOCK = 1 << 22
# Bytes that decompression leaves free on the disk of the cache.
_KEPT_FREE = 1 << 30


class JsonRecords(IndexedRecords):
    """Records of a JSON array or of JSON Lines. A .gz file is decompressed once into the cache folder."""

    @staticmethod
    def _open(path: Path) -> BinaryIO:
        return _unpacked(path) if path.suffix.lower() == COMPRESSED else path.open("rb")

    @staticmethod
    def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
        return scan(path, file)

    def _value(self, data: bytes, number: int) -> Any:
        try:
            return parse(data)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MisplacedError from error
        except ValueFault as error:
            raise DataError(f"{self._path}, record {number}: {error}") from error


def open_sequential(path: Path) -> BinaryIO:
    """Opens a JSON file for sequential reading, decompressed on the fly.

    Raises:
        OSError: it cannot be read.
    """
    return GzipFile(path) if path.suffix.lower() == COMPRESSED else path.open("rb")  # pyright: ignore[reportReturnType]


def _unpacked(path: Path) -> BinaryIO:
    """Opens the decompressed copy of a file in the cache, which is created if needed.

    Raises:
        DataError: it is damaged, or there is not enough disk space.
        OSError: it cannot be read.
    """
    resolved = path.resolve()
    name, state = (hashlib.sha256(repr(each).encode()).hexdigest() for each in (resolved, cache.signature(resolved)))
    place = cache.folder() / f"unpacked-{name[:32]}-{state[:16]}.json"
    try:
        return place.open("rb")
    except FileNotFoundError:
        pass
    with path.open("rb") as packed:
        try:
            with cache.atomic_write(place) as target:
                for block in _blocks(path, packed):
                    if shutil.disk_usage(place.parent).free < _KEPT_FREE + len(block):
                        raise DataError(
                            f"{path}: decompressed it does not fit into {place.parent} (less than 1 GiB free); "
                            "free disk space, set XDG_CACHE_HOME to a larger disk, or decompress it (gunzip)"
                        )
                    target.write(block)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be decompressed into {place.parent} ({reason(error)}); decompress it (gunzip)"
            ) from error
    for former in place.parent.glob(f"unpacked-{name[:32]}-*.json"):
        if former != place:
            former.unlink(missing_ok=True)
    return place.open("rb")


def _blocks(path: Path, packed: BinaryIO) -> Iterator[bytes]:
    try:
        with GzipFile(fileobj=packed) as file:
            while block := file.read(_BLOCK):
                yield block
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the compressed file is truncated or damaged ({error}); copy it again") from error
    except OSError as error:  # gzip.BadGzipFile is one
        raise DataError(f"{path}: cannot be decompressed ({error}); is it a .gz file, copied completely?") from error
