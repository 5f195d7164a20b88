"""Data files become samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data_files.records import folders_of, open_records
from finetune.readers.conversation import TRAIN_ON, TrainOn
from finetune.readers.form_detection import DATA_FORMATS, DataFormat, choose, some_records
from finetune.readers.record_media import places
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
    records: Sequence[Any] | None = None,
) -> SampleFile:
    """The samples of a data file; each is built, and may fail, when it is asked for.

    Args:
        path: a JSON array of records, JSON Lines, Parquet, Arrow, CSV, or a folder of such files.
        image_root: where relative media paths are looked for when they are not beside the data file.
        train_on: "all" to train every answer, "last" for the last of a conversation; ``"loss": 0`` in a turn leaves
            that turn out in either case.
        data_format: the form of the records, "auto" to tell it from the first ones.
        rebuild: make the index of the file anew.
        strict_paths: take no file outside of the folder of the data file and ``image_root``.
        records: those of the file that are read already, instead of all of them.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON (with line and cause), or holds no record, or the first
            records fit no form.
        ValueError: no such ``train_on`` or ``data_format``.
    """
    file = Path(path)
    records = open_records(file, rebuild=rebuild) if records is None else records
    form, why = choose(some_records(records), str(path), data_format)
    logger.info("%s: %d records in the %s form (%s)", path, len(records), form.name, why)
    beside = folders_of(file)[: 1 if strict_paths else None]
    return SampleFile(records, path, RecordReader(form, places(*beside, image_root, strict=strict_paths), train_on))
