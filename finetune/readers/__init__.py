"""Readers: from records of the official, ShareGPT, Alpaca and OpenAI formats to ``Sample``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data_files.records import folders_of, open_records
from finetune.readers.answer_pairs import Comparison
from finetune.readers.conversation import TRAIN_ON, TrainOn
from finetune.readers.form_detection import DATA_FORMATS, DataFormat, choose, some_records
from finetune.readers.record_media import media_folders
from finetune.readers.record_reader import RecordReader, SampleFile

__all__ = ["DATA_FORMATS", "TRAIN_ON", "DataFormat", "RecordReader", "SampleFile", "TrainOn", "read"]

logger = logging.getLogger(__name__)


def read(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    train_on: TrainOn = "all",
    data_format: DataFormat = "auto",
    rebuild: bool = False,
    strict_paths: bool = False,
    pairs: bool = False,
    records: Sequence[Any] | None = None,
) -> SampleFile:
    """The samples of a data file; each is built on access and may raise then.

    Args:
        path: a JSON array of records, JSON Lines, Parquet, Arrow, CSV, or a folder of such files.
        image_root: second base folder of relative media paths, after the folder of the data file.
        train_on: "all" to train every answer, "last" for the last one of a conversation; ``"loss": 0`` in a turn
            excludes that turn in either case.
        data_format: format of the records, "auto" to detect it from the first ones.
        rebuild: rebuild the index of the file.
        strict_paths: refuse media outside of the folder of the data file and ``image_root``.
        pairs: read preference pairs, instead of conversations.
        records: records of the file that are already open.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON (with line and cause), or empty, or the format of its first
            records is not supported.
        ValueError: invalid ``train_on`` or ``data_format``.
    """
    file = Path(path)
    records = open_records(file, rebuild=rebuild) if records is None else records
    form, why = choose(some_records(records), str(path), data_format, pairs=pairs)
    logger.info("%s: %d records in the %s format (%s)", path, len(records), form.name, why)
    beside = folders_of(file)[: 1 if strict_paths else None]
    reading = RecordReader(
        form, media_folders(*beside, image_root, strict=strict_paths), train_on, Comparison() if pairs else None
    )
    return SampleFile(records, path, reading)
