"""Data files become samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.readers.official import TRAIN_ON, OfficialDataset, TrainOn
from finetune.sample import Sample

__all__ = ["TRAIN_ON", "TrainOn", "read"]


def read(path: str | Path, *, image_root: str | Path | None = None, train_on: TrainOn = "all") -> Sequence[Sample]:
    """The samples of a data file in the official form; each is built, and may fail, when it is asked for.

    Args:
        path: a JSON array of records, or JSON Lines.
        image_root: where relative image paths are looked for when they are not beside the data file.
        train_on: "all" to train every answer, "last" for the last of a conversation; ``"loss": 0`` in a turn leaves
            that turn out in either case.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON (with line and cause), or holds no record.
        ValueError: no such ``train_on``.
    """
    return OfficialDataset(path, image_root=image_root, train_on=train_on)
