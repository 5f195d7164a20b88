"""``open_records``: the records of a data file or folder of any supported type, parsed on access."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.data_files.json_errors import unreadable
from finetune.data_files.json_file import JsonRecords
from finetune.data_files.tables import TABLES, open_table
from finetune.data_files.webdataset import SHARD, ShardRecords
from finetune.sample import IMAGE_SUFFIXES, DataError
from finetune.utils.file_types import is_folder, is_special

_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Metadata files beside the Arrow files of Dataset.save_to_disk.
_SAVED = "state.json"
_NO_DATA = ("dataset_info.json", _SAVED)
# Written by DatasetDict.save_to_disk, whose splits are subfolders.
_SPLITS = "dataset_dict.json"
# Shard patterns: data-{000..012}.tar, or {a,b}.
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},/]+(?:,[^{},/]+)+))\}")
_MOST_SHARDS = 1_000_000
_SPLIT = re.compile(r"train(?:\[(?:(-?\d+)(%?))?(:)(?:(-?\d+)(%?))?\])?")


def open_records(path: Path, *, rebuild: bool = False) -> Sequence[Any]:
    """Records of a data file, or of a folder of files of one type in the order of their names.

    The suffix gives the type: Parquet, Arrow, CSV, tar shards of WebDataset, else JSON (an array or JSON Lines by its
    first character, decompressed if it ends in .gz). Records are plain Python values; rows of tables are
    dictionaries without None values, and CSV cells are text or numbers. Images embedded in Parquet, Arrow or shards are
    not decoded: dictionaries with ``bytes``, ``path`` or both. The result can be pickled and shared with processes.

    Args:
        path: the file or folder.
        rebuild: rebuild indexes and caches of the files.

    Raises:
        DataError: missing, malformed (with line and cause) or empty; or a folder with files of several types.
    """
    files = data_files(path)
    if kind_of(files[0]) in TABLES:
        return open_table(files, rebuild=rebuild)
    opened = [(ShardRecords if kind_of(file) == SHARD else JsonRecords)(file, rebuild=rebuild) for file in files]
    return opened[0] if len(opened) == 1 else Chain(opened)


def kind_of(file: Path) -> str:
    """The type of a data file by its name: a suffix of TABLES, .tar for shards, or .json for everything else."""
    ending = file.suffix.lower()
    return ending if ending in (*TABLES, SHARD) else ".json"


def _images(folder: Path) -> str:
    """What to do with a folder of images."""
    if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir()):
        return ""
    return f"; for a folder of images: python -m finetune init DIR --images {folder} --answers TABLE.csv"


def data_files(path: Path) -> list[Path]:
    """The file itself, the shards of a pattern, or the data files of a folder in the order of their names.

    Raises:
        DataError: the folder has none, or several types or splits.
    """
    if is_special(path):
        raise DataError(f"{path}: is a pipe, a socket or a device; write the records to a regular file")
    if is_pattern(path):
        return _shards(path)
    if not is_folder(path):
        return [path]
    splits = splits_of(path)
    if splits is not None:
        if len(splits) != 1:
            raise DataError(_which_split(path, splits))
        return data_files(path / splits[0])
    try:
        found = sorted(file for file in path.iterdir() if file.name.lower().endswith((*_JSON, *TABLES, SHARD)))
    except OSError as error:
        raise unreadable(path, error) from error
    files = [file for file in found if file.is_file() and not file.name.startswith(".") and file.name not in _NO_DATA]
    kinds = {kind_of(file) for file in files}
    if not kinds:
        raise DataError(
            f"{path}: the folder has no data file; supported are {', '.join((*_JSON, *TABLES, SHARD))}{_images(path)}"
        )
    if len(kinds) > 1:
        raise DataError(
            f"{path}: the folder has data files of several types ({', '.join(sorted(kinds))}); keep one, or name a file"
        )
    return files


def is_pattern(path: Path) -> bool:
    """Whether it is a shard pattern, and not an existing file or folder."""
    return path.suffix.lower() == SHARD and _BRACES.search(path.name) is not None and not path.exists()


def _shards(path: Path) -> list[Path]:
    def names(pattern: str) -> list[str]:
        found = _BRACES.search(pattern)
        if found is None:
            return [pattern]
        first, last, names_list = found.groups()
        rest = names(pattern[found.end() :])
        count = len(names_list.split(",")) if names_list else int(last) - int(first) + 1
        if not 0 < count * len(rest) <= _MOST_SHARDS:
            raise DataError(f"{path}: {found[0]} are {count} shards; write {{FIRST..LAST}}, as {{000..012}}")
        each = names_list.split(",") if names_list else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        return [pattern[: found.start()] + one + more for one in each for more in rest]

    return [path.with_name(name) for name in names(path.name)]


def splits_of(path: Path) -> list[str] | None:
    """The splits of a folder of DatasetDict.save_to_disk; None for any other path."""
    if not (path / _SPLITS).is_file():
        return None
    try:
        noted = json.loads((path / _SPLITS).read_text(encoding="utf-8"))
        return sorted(map(str, noted["splits"]))
    except (OSError, ValueError, KeyError, TypeError):
        return sorted(each.name for each in path.iterdir() if each.is_dir())


def choose_split(path: Path, split: str, where: str) -> tuple[Path, str]:
    """The folder of a split of a DatasetDict, and the slice of it; other paths are returned unchanged.

    Args:
        path: a file or folder.
        split: such as ``test`` or ``train[:10%]``.
        where: name for errors.

    Raises:
        DataError: there is no such split.
    """
    splits = splits_of(path)
    if splits is None:
        return path, split
    name, bracket, part = split.strip().partition("[")
    if name.strip() not in splits:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(splits) or 'no split'}, those of {path}")
    return path / name.strip(), f"train{bracket}{part}"


def folders_of(path: Path) -> list[Path]:
    """Base folders of relative media paths: the folder of the data file, or the data folder itself.

    For a folder of save_to_disk also its parent, since media files are not stored inside it.
    """
    if not is_folder(path):
        return [path.resolve().parent]
    made = (path / _SAVED).is_file()
    outer = path.parent.parent if (path.parent / _SPLITS).is_file() else path.parent
    return [path, outer] if made else [path]


def _which_split(path: Path, splits: list[str]) -> str:
    """The message for a DatasetDict folder with no or several splits."""
    if not splits:
        return f"{path}: a DatasetDict without a split; give the folder of a data set"
    last = path / ("train" if "train" in splits else splits[0])
    return f"{path}: a DatasetDict with the splits {', '.join(splits)}; give {last}"


class Chain(Sequence[Any]):
    """Concatenation of several sequences."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record at ``index`` of the concatenation."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class Part(Sequence[Any]):
    """A contiguous range of a sequence."""

    def __init__(self, records: Sequence[Any], chosen: range) -> None:
        self._records, self._chosen = records, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record at ``index`` of the range."""
        return self._records[self._chosen[index]]


def take_split(records: Sequence[Any], split: str, where: str) -> Sequence[Any]:
    """The records of a split such as ``train[:10%]``.

    Args:
        records: all records.
        split: ``train``, or ``train[a:b]`` with positions, or percentages rounded to the nearest record; negative ones
            count from the end. Local files have no split but ``train``.
        where: name for errors, such as the entry of dataset_info.json.

    Raises:
        DataError: invalid syntax, or a range that is empty or out of bounds.
    """
    found = _SPLIT.fullmatch(re.sub(r"\s", "", split))
    if found is None:
        raise DataError(
            f"{where}: split {split!r} is not supported; local files have 'train', and slices of it such as "
            "'train[:1000]', 'train[10%:20%]', 'train[-5%:]'"
        )
    if found[3] is None:
        return records
    count = len(records)
    start = _boundary(found[1], found[2], count, 0)
    stop = _boundary(found[4], found[5], count, count)
    if not 0 <= start < stop <= count:
        raise DataError(f"{where}: split {split!r} is records {start} to {stop} of {count}; give a non-empty range")
    return Part(records, range(start, stop))


def _boundary(number: str | None, percent: str | None, count: int, absent: int) -> int:
    if number is None:
        return absent
    at = round(int(number) * count / 100) if percent else int(number)
    return at + count if number.startswith("-") else at
