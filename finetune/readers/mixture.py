"""``Mixture``: several data sets as one, with weights, random subsets and the train/evaluation split."""

from __future__ import annotations

import json
import logging
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np

from finetune.readers import read
from finetune.readers.conversation import TrainOn
from finetune.readers.dataset_info import Entry, find_entry, open_entry
from finetune.readers.form_detection import DataFormat
from finetune.readers.record_keys import is_timeline
from finetune.readers.record_reader import SampleFile
from finetune.sample import DataError, Sample, SampleSet, Source

logger = logging.getLogger(__name__)

MOST_TIMES = 10_000
"""Maximum number of repetitions of a record per epoch; larger values are refused as mistakes."""


class Mixture(SampleSet):
    """The records of several files, in a given order.

    Args:
        files: the files; their records are numbered consecutively.
        order: record numbers; None for all records in order.
    """

    def __init__(self, files: Sequence[SampleFile], order: np.ndarray | None = None) -> None:
        self._files = list(files)
        self._ends = list(accumulate(map(len, self._files)))
        self._order = order

    def __len__(self) -> int:
        return self._ends[-1] if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample at ``index``.

        Raises:
            DataError: the record does not match its format, or a media file does not exist.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        file, number = self._locate(index)
        return file[number]

    def record(self, index: int) -> Any:
        """Record ``index`` as stored in its file."""
        file, number = self._locate(index)
        return file.record(number)

    def source(self, index: int) -> Source:
        """File and position of record ``index``, also of a bad one."""
        file, number = self._locate(index)
        return file.source(number)

    def format_of(self, index: int) -> str:
        """Name of the format of record ``index``."""
        return self._locate(index)[0].reading.form.name

    @property
    def train_on(self) -> TrainOn:
        """Which answers are trained."""
        return self._files[0].train_on

    @property
    def files(self) -> list[Path]:
        """The data files, on which cached results depend."""
        return list(dict.fromkeys(path for file in self._files for path in file.files))

    @property
    def fingerprint(self) -> str:
        """Text that changes when the selection of records or the way they are read changes."""
        state = 0 if self._order is None else zlib.crc32(self._order.tobytes())
        return json.dumps([[str(file.path), file.fingerprint] for file in self._files] + [[len(self), state]])

    @property
    def has_timelines(self) -> bool:
        """Whether some record is a full-duplex one; the records are not read as samples."""
        if any(file.reading.form.name == "duplex" for file in self._files):
            return True
        records = (self.record(index) for index in range(len(self)))
        return any(isinstance(record, dict) and is_timeline(record) for record in records)

    @property
    def title(self) -> str:
        """Names of the data sets, or the path of the file."""
        return ", ".join(file.name or str(file.path) for file in self._files)

    def _locate(self, index: int) -> tuple[SampleFile, int]:
        number = range(len(self))[index]
        if self._order is not None:
            number = int(self._order[number])
        place = bisect_right(self._ends, number)
        return self._files[place], number - (self._ends[place - 1] if place else 0)

    @property
    def unique(self) -> Mixture:
        """The same records without repetitions."""
        if self._order is None:
            return self
        _, places = np.unique(self._order, return_index=True)
        return self if len(places) == len(self) else Mixture(self._files, self._order[np.sort(places)])

    def first(self, limit: int | None) -> Mixture:
        """The first ``limit`` records."""
        if limit is None or limit >= len(self):
            return self
        return Mixture(self._files, self._numbers()[:limit])

    def split(self, share: float, seed: int) -> tuple[Mixture, Mixture]:
        """A random train/evaluation split without common records; the order is kept.

        Args:
            share: fraction of the records (below 1) or number of records for evaluation.
            seed: random seed.

        Raises:
            DataError: one part would be empty.
        """
        numbers = self._numbers()
        same = self._same_record(numbers)
        records, first_places = np.unique(same, return_index=True)
        count = round(share * len(records)) if share < 1 else int(share)
        if not 0 < count < len(records):
            raise DataError(
                f"--val_size {share:g} of {len(records)} records gives {count} for evaluation and "
                f"{len(records) - count} for training; both need at least one"
            )
        held = np.random.default_rng([seed, 1]).choice(len(records), count, replace=False)
        kept = ~np.isin(same, records[held])
        return Mixture(self._files, numbers[kept]), Mixture(self._files, numbers[np.sort(first_places[held])])

    def _numbers(self) -> np.ndarray:
        return np.arange(len(self)) if self._order is None else self._order

    def _same_record(self, numbers: np.ndarray) -> np.ndarray:
        """The record numbers, where those of a repeated file are replaced by those of its first occurrence."""
        result = numbers.copy()
        first: dict[Path, int] = {}
        start = 0
        for file, end in zip(self._files, self._ends, strict=True):
            origin = first.setdefault(file.path.resolve(), start)
            result[(numbers >= start) & (numbers < end)] -= start - origin
            start = end
        return result


Numbers = range | np.ndarray


def open_data(
    path: str | Path | None,
    names: str | None,
    *,
    dataset_dir: str | Path = "data",
    media_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    train_on: TrainOn = "all",
    data_format: DataFormat = "auto",
    max_samples: int | None = None,
    seed: int = 42,
    rebuild: bool = False,
    strict_paths: bool = False,
    pairs: bool = False,
) -> Mixture:
    """The samples of a data file (``readers.read``), or of data sets by name (``read_named``) if ``path`` is None.

    Raises:
        DataError: as these functions.
    """
    if path is not None:
        file = read(
            path,
            image_root=image_root,
            train_on=train_on,
            data_format=data_format,
            rebuild=rebuild,
            strict_paths=strict_paths,
            pairs=pairs,
        )
        return Mixture([file]).first(max_samples)
    return read_named(
        names or "",
        dataset_dir,
        media_dir=media_dir,
        image_root=image_root,
        train_on=train_on,
        max_samples=max_samples,
        seed=seed,
        rebuild=rebuild,
        strict_paths=strict_paths,
        pairs=pairs,
    )


@dataclass(frozen=True, slots=True)
class WeightedName:
    """One data set of a list such as ``a,b:0.3``, with its weight."""

    name: str
    weight: float = 1.0


def parse_names(text: str) -> list[WeightedName]:
    """The data sets of a list.

    Raises:
        DataError: a name is missing or named twice, or a weight is not a number above 0.
    """
    found: list[WeightedName] = []
    for part in text.split(","):
        name, colon, weight = (text_part.strip() for text_part in part.partition(":"))
        if not name:
            raise DataError(f"data sets {text!r}: a name is missing; write names separated by commas, such as a,b:0.3")
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = 0.0
        if not 0 < number <= MOST_TIMES:
            raise DataError(
                f"data sets {text!r}: the weight of {name!r} is {weight!r}; it must be a number above 0 and at most "
                f"{MOST_TIMES}: 0.3 takes 30 % of the records, 2 takes each twice"
            )
        if name in (named.name for named in found):
            raise DataError(f"data sets {text!r}: {name!r} is named twice; to take its records twice write {name}:2")
        found.append(WeightedName(name, number))
    return found


def read_named(
    names: str,
    dataset_dir: str | Path = "data",
    *,
    media_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    train_on: TrainOn = "all",
    max_samples: int | None = None,
    seed: int = 42,
    rebuild: bool = False,
    strict_paths: bool = False,
    pairs: bool = False,
) -> Mixture:
    """The records of registered data sets, one set after another.

    Args:
        names: such as ``a,b:0.3``: a weight below 1 samples that fraction of the records, at least one; above 1 repeats
            every record by its integer part, and a random fraction once more.
        dataset_dir: folder of ``dataset_info.json``.
        media_dir: first base folder of media paths; ``dataset_dir`` by default.
        image_root: another base folder.
        train_on: one of TRAIN_ON.
        max_samples: maximum number of records per data set, before weights.
        seed: random seed; the sampling of a data set does not depend on the others.
        rebuild: rebuild the indexes of the files.
        strict_paths: refuse media outside of these folders and those of the data files.
        pairs: read preference pairs, instead of conversations.

    Raises:
        DataError: a name is not registered, its description cannot be used, or its file cannot be read.
    """
    files: list[SampleFile] = []
    chosen: list[Numbers] = []
    for each in parse_names(names):
        entry = find_entry(each.name, dataset_dir)
        file = open_entry(
            entry,
            media_dir=media_dir,
            image_root=image_root,
            train_on=train_on,
            rebuild=rebuild,
            strict_paths=strict_paths,
            pairs=pairs,
        )
        files.append(file)
        random = np.random.default_rng([seed, zlib.crc32(each.name.encode())])
        chosen.append(_weighted(_drawn(entry, len(file), random)[:max_samples], each.weight, random))
    return _joined(files, chosen)


def _joined(files: Sequence[SampleFile], chosen: Sequence[Numbers]) -> Mixture:
    """The chosen records of every file, one file after another; logs the share of each."""
    total = sum(map(len, chosen))
    for file, numbers in zip(files, chosen, strict=True):
        share = 100 * len(numbers) / total
        logger.info("data set %s: %d samples, %.1f %% of %d", file.name, len(numbers), share, total)
    starts = [0, *accumulate(map(len, files))]
    if all(isinstance(numbers, range) for numbers in chosen) and total == starts[-1]:
        return Mixture(files)  # no list of numbers to keep in memory
    shifted = [np.asarray(numbers) + start for numbers, start in zip(chosen, starts, strict=False)]
    return Mixture(files, np.concatenate(shifted))


def _drawn(entry: Entry, records: int, random: np.random.Generator) -> Numbers:
    """A random sample of ``num_samples`` records without replacement; records repeat only if there are too few.

    Raises:
        DataError: a record would repeat too often.
    """
    if (number := entry.num_samples) is None:
        return range(records)
    if number > MOST_TIMES * records:
        raise DataError(
            f"{entry.where}: 'num_samples' is {number}, of {records} records; each may be repeated {MOST_TIMES} times "
            "at most"
        )
    once = random.permutation(records)[:number]
    return np.concatenate([once, random.integers(0, records, number - len(once))])


def _weighted(numbers: Numbers, weight: float, random: np.random.Generator) -> Numbers:
    """The records repeated by the integer part of the weight, plus a random fraction of them, in order."""
    whole, rest = divmod(weight, 1)
    if weight == 1:
        return numbers
    times = np.full(len(numbers), int(whole))
    count = round(rest * len(numbers))
    if whole == 0:
        count = max(count, 1)
    times[random.choice(len(numbers), count, replace=False)] += 1
    return np.repeat(np.asarray(numbers), times)
