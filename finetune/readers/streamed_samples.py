"""``StreamedSamples``: reads samples sequentially from streamed data (``--streaming``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data_files.hub import HubStream
from finetune.data_files.streaming import Stream, Streamed
from finetune.readers import SampleFile, read
from finetune.readers.conversation import TrainOn
from finetune.readers.dataset_info import Entry, find_entry, load_hub, open_entry
from finetune.readers.form_detection import DataFormat
from finetune.readers.mixture import Mixture, WeightedName, parse_names
from finetune.readers.record_reader import identity
from finetune.sample import DataError, Sample

logger = logging.getLogger(__name__)


class StreamedSamples:
    """Builds samples from the records of a stream.

    Args:
        stream: a stream of one or several paths.
        heads: the first samples of each path; their reader is used for all records of the path.

    Attributes:
        head: the first samples of all paths, for checks that need samples by index.
    """

    def __init__(self, stream: Stream | HubStream, heads: Sequence[SampleFile]) -> None:
        self.stream = stream
        self.head = Mixture(heads)
        self._readings = [head.reading for head in heads]

    def sample(self, record: Streamed) -> Sample:
        """The sample of a record.

        Raises:
            DataError: the record is not JSON or does not match its format, or a media file does not exist.
        """
        value, source = record.parse(), record.source()
        return self._readings[record.which].sample(value, replace(source, id=identity(value)))


class _Parsed(Sequence[Any]):
    """Records of a stream, parsed on access."""

    def __init__(self, records: Sequence[Streamed]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record at ``index``."""
        return self._records[index].parse()


def open_stream(
    path: str | Path | None,
    names: str | None,
    *,
    dataset_dir: str | Path = "data",
    media_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    train_on: TrainOn = "all",
    data_format: DataFormat = "auto",
    seed: int = 42,
    buffer_size: int = 16384,
    strict_paths: bool = False,
) -> StreamedSamples:
    """The streamed samples of a data file, or of data sets by name if ``path`` is None.

    Args:
        path: JSON Lines, Parquet, WebDataset shards, or a folder of such files.
        names: registered data sets, separated by commas; they are one stream, in proportion to their records.
        dataset_dir: folder of ``dataset_info.json``.
        media_dir: first base folder of media paths of registered data sets; ``dataset_dir`` by default.
        image_root: another base folder.
        train_on: one of TRAIN_ON.
        data_format: format of the records of ``path``, "auto" to detect it from the first ones.
        seed: random seed of the order.
        buffer_size: size of the shuffle buffer per reader.
        strict_paths: refuse media outside of the folders above and those of the data files.

    Raises:
        DataError: an unsupported file type, a malformed or missing file, or an option that needs all records.
    """
    if path is not None:
        stream = Stream([Path(path)], seed=seed, buffer_size=buffer_size)
        head = _Parsed(stream.head())
        logger.info("%s: streaming, format detected from the first %d records:", path, len(head))
        options = {"image_root": image_root, "train_on": train_on, "strict_paths": strict_paths}
        return StreamedSamples(stream, [read(path, data_format=data_format, records=head, **options)])
    entries = [_entry(named, dataset_dir) for named in parse_names(names or "")]
    stream = _stream(entries, seed, buffer_size)
    options = {"media_dir": media_dir, "image_root": image_root, "train_on": train_on, "strict_paths": strict_paths}
    heads = []
    for which, entry in enumerate(entries):
        head = _Parsed(stream.head(which))
        logger.info("data set %s: streaming, format detected from the first %d records:", entry.name, len(head))
        heads.append(open_entry(entry, records=head, **options))
    return StreamedSamples(stream, heads)


def _stream(entries: Sequence[Entry], seed: int, buffer_size: int) -> Stream | HubStream:
    """The stream of local files, or of data sets of the hub."""
    far = [entry for entry in entries if entry.file is None]
    if far and len(far) < len(entries):
        raise DataError(
            f"{far[0].where}: data sets of the hub and local files cannot be mixed with --streaming true, since their "
            "number of records is unknown; download it and give its file under 'file_name', or remove --streaming"
        )
    if not far:
        return Stream([entry.file for entry in entries if entry.file], seed=seed, buffer_size=buffer_size)
    names = [" ".join(filter(None, (entry.hub, entry.subset, entry.folder, entry.split))) for entry in far]
    rows = [load_hub(entry, streaming=True) for entry in far]
    return HubStream(rows, names, seed=seed, buffer_size=buffer_size)


def _entry(named: WeightedName, dataset_dir: str | Path) -> Entry:
    """The entry of a data set, without options that need all records."""
    entry = find_entry(named.name, dataset_dir)
    wishes = {
        f"the weight {named.weight:g}": named.weight != 1,
        f"'split' {entry.split!r}": "[" in entry.split or (entry.file is not None and entry.split != "train"),
        "'num_samples'": entry.num_samples is not None,
    }
    wish = next((wish for wish, there in wishes.items() if there), None)
    if wish is not None:
        raise DataError(
            f"{entry.where}: {wish} is not supported with --streaming true, which reads whole data sets sequentially; "
            "remove it, or remove --streaming"
        )
    return entry
