"""Parquet, Arrow and CSV files as ``TableRecords``, memory-mapped by the ``datasets`` library."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.data_files.json_errors import unreadable
from finetune.sample import DataError
from finetune.utils import cache
from finetune.utils.file_types import foreign

logger = logging.getLogger(__name__)

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""Suffix to the name of the library's loader."""


class TableRecords(Sequence[Any]):
    """Rows of a table as plain dictionaries.

    Args:
        rows: a ``datasets.Dataset``.
        name: name of the file for errors.
    """

    def __init__(self, rows: Any, name: str = "the table") -> None:
        self._rows = rows
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The row at ``index``.

        Raises:
            DataError: it cannot be read.
        """
        number = range(len(self))[index]
        try:
            return present(self._rows[number])
        except (*arrow_errors(), OSError, ValueError, OverflowError) as error:
            raise DataError(f"{self._name}, record {number}: cannot be read ({_reason(error)})") from error


def open_table(files: Sequence[Path], *, rebuild: bool = False) -> TableRecords:
    """Rows of files of one kind, converted once to Arrow files in the cache folder.

    Args:
        files: Parquet, Arrow or CSV files.
        rebuild: convert them again.

    Raises:
        DataError: a file is missing or malformed, or there are no rows.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    for file in files:
        try:
            kind = foreign(file)
        except (OSError, ValueError) as error:
            raise unreadable(file, error) from error
        if kind is not None:  # the library would extract archives
            raise DataError(f"{file}: {kind}")
    name = str(files[0] if len(files) == 1 else files[0].parent)
    kind = TABLES[files[0].suffix.lower()]
    with quiet():
        try:
            rows = datasets.load_dataset(
                kind,
                data_files=[glob.escape(str(file.resolve())) for file in files],
                split="train",
                cache_dir=str(cache.folder() / "tables"),
                download_mode="force_redownload" if rebuild else None,
            )
        except (DatasetsError, *arrow_errors(), OSError, ValueError, TypeError, KeyError) as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"{name}: the table has no row; training and evaluation need at least one") from error
            raise DataError(f"{name}: cannot be read as {kind}: {_reason(error)}") from error
    return TableRecords(undecoded(rows), name)


@contextmanager
def quiet() -> Iterator[None]:
    """Disables progress bars and download counts (telemetry) of the library."""
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    bars, counts = are_progress_bars_disabled(), config.HF_UPDATE_DOWNLOAD_COUNTS
    disable_progress_bars()
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not bars:
            enable_progress_bars()


def present(value: Any) -> Any:
    """The value without keys that are None: Arrow structs have the keys of all objects of a column."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [present(item) for item in value]
    return value


def undecoded(rows: Any) -> Any:
    """The rows with embedded media not decoded: the encoder decodes them and reports errors."""
    import datasets

    media = (datasets.Image, datasets.Audio, datasets.Video)
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, media):
            rows = rows.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, media):
            rows = rows.cast_column(column, datasets.List(type(feature.feature)(decode=False)))
    return rows


def arrow_errors() -> tuple[type[Exception], ...]:
    """The exceptions of Arrow, not all of which are ArrowException."""
    from pyarrow import ArrowException, ArrowKeyError, ArrowNotImplementedError, ArrowTypeError

    return ArrowException, ArrowKeyError, ArrowNotImplementedError, ArrowTypeError


def _reason(error: BaseException) -> str:
    """The first line of the message of the root cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__
