"""Records of data files of every kind, each parsed when it is asked for."""

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
from finetune.sample import DataError
from finetune.utils.file_types import is_folder, is_special

_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Beside the Arrow files of Dataset.save_to_disk; no data.
_SAVED = "state.json"
_NO_DATA = ("dataset_info.json", _SAVED)
# Of DatasetDict.save_to_disk, whose splits are folders beside it.
_SPLITS = "dataset_dict.json"
# Shards: data-{000..012}.tar, or with names in place of the numbers.
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},/]+(?:,[^{},/]+)+))\}")
_MOST_SHARDS = 1_000_000
_SPLIT = re.compile(r"train(?:\[(?:(-?\d+)(%?))?(:)(?:(-?\d+)(%?))?\])?")


def open_records(path: Path, *, rebuild: bool = False) -> Sequence[Any]:
    """Records of a data file, or of a folder of files of one kind in the order of their names.

    A file is Parquet, Arrow, CSV or a tar shard of WebDataset by its ending; every other one is JSON, an array or JSON
    Lines by its first character, unpacked where it ends in .gz. Records are plain Python values: of tables
    dictionaries by column, without the keys that are None; cells of CSV are text or numbers. Images embedded in
    Parquet, Arrow or shards come undecoded, as dictionaries with ``bytes``, ``path`` or both. The result may be shared
    with, or pickled to, other processes.

    Args:
        path: the file or folder.
        rebuild: make what is remembered about the files anew.

    Raises:
        DataError: missing, malformed (with line and cause) or without records; or a folder of files of several kinds.
    """
    files = data_files(path)
    if kind_of(files[0]) in TABLES:
        return open_table(files, rebuild=rebuild)
    opened = [(ShardRecords if kind_of(file) == SHARD else JsonRecords)(file, rebuild=rebuild) for file in files]
    return opened[0] if len(opened) == 1 else Chain(opened)


def kind_of(file: Path) -> str:
    """What a data file is by its name: an ending of TABLES, that of shards, or .json for everything else."""
    ending = file.suffix.lower()
    return ending if ending in (*TABLES, SHARD) else ".json"


def data_files(path: Path) -> list[Path]:
    """The file itself, the shards of a pattern, or the data files of a folder in the order of their names.

    Raises:
        DataError: the folder has none, or several kinds or splits.
    """
    if is_special(path):
        raise DataError(f"{path}: is a pipe, a socket or a device; write the records to a file and give that")
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
        raise DataError(f"{path}: the folder has no data file; these count: {', '.join((*_JSON, *TABLES, SHARD))}")
    if len(kinds) > 1:
        raise DataError(
            f"{path}: the folder has data files of several kinds ({', '.join(sorted(kinds))}); keep one, or name a file"
        )
    return files


def is_pattern(path: Path) -> bool:
    """Whether it names several shards, and no file or folder."""
    return path.suffix.lower() == SHARD and _BRACES.search(path.name) is not None and not path.exists()


def _shards(path: Path) -> list[Path]:
    def names(pattern: str) -> list[str]:
        found = _BRACES.search(pattern)
        if found is None:
            return [pattern]
        first, last, words = found.groups()
        rest = names(pattern[found.end() :])
        count = len(words.split(",")) if words else int(last) - int(first) + 1
        if not 0 < count * len(rest) <= _MOST_SHARDS:
            raise DataError(f"{path}: {found[0]} are {count} shards; write {{FIRST..LAST}}, as {{000..012}}")
        each = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        return [pattern[: found.start()] + one + more for one in each for more in rest]

    return [path.with_name(name) for name in names(path.name)]


def splits_of(path: Path) -> list[str] | None:
    """The splits of a folder that DatasetDict.save_to_disk made; None for any other path."""
    if not (path / _SPLITS).is_file():
        return None
    try:
        noted = json.loads((path / _SPLITS).read_text(encoding="utf-8"))
        return sorted(map(str, noted["splits"]))
    except (OSError, ValueError, KeyError, TypeError):
        return sorted(each.name for each in path.iterdir() if each.is_dir())


def choose_split(path: Path, split: str, where: str) -> tuple[Path, str]:
    """The folder of a split of a DatasetDict and what part of it is meant; any other path as it is.

    Args:
        path: a file or folder.
        split: such as ``test`` or ``train[:10%]``.
        where: what errors name.

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
    """Where relative paths of media may start: the folder of a data file, or a folder of them; and what that is in
    where save_to_disk made it, since nobody puts files into such a folder.
    """
    if not is_folder(path):
        return [path.resolve().parent]
    made = (path / _SAVED).is_file()
    outer = path.parent.parent if (path.parent / _SPLITS).is_file() else path.parent
    return [path, outer] if made else [path]


def _which_split(path: Path, splits: list[str]) -> str:
    """What to say of a folder of several data sets, or none."""
    if not splits:
        return f"{path}: a DatasetDict without a split; give the folder of a data set"
    last = path / ("train" if "train" in splits else splits[0])
    return f"{path}: a DatasetDict with the splits {', '.join(splits)}; give {last}"


class Chain(Sequence[Any]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record at ``index`` of all."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class Part(Sequence[Any]):
    """Some neighbouring records of a sequence."""

    def __init__(self, records: Sequence[Any], chosen: range) -> None:
        self._records, self._chosen = records, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record at ``index`` of the part."""
        return self._records[self._chosen[index]]


def take_split(records: Sequence[Any], split: str, where: str) -> Sequence[Any]:
    """The records that a split such as ``train[:10%]`` names, parsed when asked for.

    Args:
        records: all of them.
        split: ``train``, or ``train[a:b]`` with positions, or percentages rounded to the nearest record; negative ones
            count from the end. Local files have no split but ``train``.
        where: what errors name, such as the entry of dataset_info.json.

    Raises:
        DataError: another form, or a part that has no record or more than there are.
    """
    found = _SPLIT.fullmatch(re.sub(r"\s", "", split))
    if found is None:
        raise DataError(
            f"{where}: split {split!r} is not understood; local files have 'train', and parts of it such as "
            "'train[:1000]', 'train[10%:20%]', 'train[-5%:]'"
        )
    if found[3] is None:
        return records
    count = len(records)
    start = _boundary(found[1], found[2], count, 0)
    stop = _boundary(found[4], found[5], count, count)
    if not 0 <= start < stop <= count:
        raise DataError(f"{where}: split {split!r} is records {start} to {stop} of {count}; name a part that is there")
    return Part(records, range(start, stop))


def _boundary(number: str | None, percent: str | None, count: int, absent: int) -> int:
    if number is None:
        return absent
    at = round(int(number) * count / 100) if percent else int(number)
    return at + count if number.startswith("-") else at
