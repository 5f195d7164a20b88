"""Reads the published Parquet files: extracts images and page elements."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.media.image_files import UnreadableError, open_image, reading
from finetune.sample import DataError
from finetune.utils.quoting import shown

_DATA = "base64"
_IMAGES_PER_CHUNK = 1000
_STEP = re.compile(r"uid_(?:record|episode)_(.+)_step_(.+)")
_UNSAFE = re.compile(r"[/\\\x00]")
# First bytes of the formats in which screenshots come; a GUIChat file holds them as they are, others in base64.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")


def extract(
    parquets: Sequence[Path], wanted: Collection[str], folder: Path, *, original: bool = False
) -> tuple[dict[str, Path], dict[str, str]]:
    """Writes the missing images among ``wanted``; each file is written atomically.

    Screenshots of steps go to ``record_<id>/step_<n>``, others to ``chunk_<n>/<id>``, a thousand rows each.

    Args:
        parquets: published files, read in order.
        wanted: image ids.
        folder: where the images go.
        original: keep the bytes of the file (mostly JPEG); False writes PNG, as the published preparation does.

    Returns:
        Path by image id, and error message by id of each invalid image.

    Raises:
        DataError: a file is missing or has no image column.
    """
    paths: dict[str, Path] = {}
    bad: dict[str, str] = {}
    row = 0
    for parquet in parquets:
        for names, load in _groups(parquet):
            places = {name: _place(folder, name, row + number) for number, name in enumerate(names) if name in wanted}
            row += len(names)
            found = {name: written for name, place in places.items() if (written := _written(place)) is not None}
            paths.update(found)
            if missing := set(places) - set(found):
                for name, data in zip(names, load(), strict=True):
                    if name in missing:
                        _write(name, data, places[name], original, paths, bad)
    return paths, bad


def _write(name: str, data: Any, place: Path, original: bool, paths: dict[str, Path], bad: dict[str, str]) -> None:
    if _UNSAFE.search(name) or name.startswith("."):
        bad[name] = f"image id {name!r} is not a file name"
        return
    try:
        content = _bytes(data)
        with open_image(io.BytesIO(content)) as image, reading():
            kind = (image.format or "PNG").lower().replace("jpeg", "jpg")
            decoded = image.convert("RGB")
    except (UnreadableError, OSError, ValueError) as error:
        bad[name] = f"image {shown(name)} cannot be decoded ({error})"
        return
    target = place.with_name(f"{place.name}.{kind if original else 'png'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}")
    if original:
        unfinished.write_bytes(content)
    else:
        decoded.save(unfinished, "PNG")
    unfinished.replace(target)
    paths[name] = target


def elements(parquets: Sequence[Path], wanted: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """The page elements (``uid``, ``rect``) of the wanted images.

    Raises:
        DataError: a file is missing or has no ``elements``.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for parquet in parquets:
        for names, load in _groups(parquet, "elements"):
            if any(name in wanted for name in names):
                found.update((name, value or []) for name, value in zip(names, load(), strict=True) if name in wanted)
    return found


def _groups(parquet: Path, column: str = _DATA) -> Iterator[tuple[list[str], Any]]:
    """Per row group the image ids, and a function that reads the column; the column is large, the ids are not."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    if not parquet.is_file():
        raise DataError(f"{parquet}: no such file; give the published Parquet file of the images")
    try:
        file = ParquetFile(parquet)
    except ArrowInvalid as error:
        raise DataError(
            f"{parquet}: not a Parquet file ({error}); was it downloaded completely, with git lfs?"
        ) from error
    with file:
        index = _index_column(file, parquet)
        if column not in file.schema_arrow.names:
            raise DataError(f"{parquet}: has no column {column!r}, only {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            names = [str(name) for name in file.read_row_group(group, columns=[index]).column(0).to_pylist()]
            # Row groups of large images: the column is read only where it is needed.
            yield names, lambda group=group: file.read_row_group(group, columns=[column]).column(column).to_pylist()


def _index_column(file: Any, parquet: Path) -> str:
    """The column of image ids: the index that pandas wrote, or one called like it."""
    names = file.schema_arrow.names
    stored: Mapping[str, Any] = file.schema_arrow.pandas_metadata or {}
    candidates = [name for name in stored.get("index_columns", []) if isinstance(name, str)]
    for name in (*candidates, "index", "__index_level_0__", "image_id", "uid"):
        if name in names:
            return name
    raise DataError(f"{parquet}: no column of image ids among {', '.join(names)}; expected the index or image_id")


def _place(folder: Path, name: str, row: int) -> Path:
    """Path without the suffix."""
    if step := _STEP.fullmatch(name):
        return folder / f"record_{step[1]}" / f"step_{step[2]}"
    return folder / f"chunk_{row // _IMAGES_PER_CHUNK}" / name


def _written(place: Path) -> Path | None:
    candidates = (place.with_name(f"{place.name}.{ending}") for ending in ("png", "jpg", "gif", "webp"))
    return next((path for path in candidates if path.is_file()), None)


def _bytes(data: Any) -> bytes:
    if isinstance(data, bytes) and data.startswith(_MAGIC):
        return data
    if not isinstance(data, (bytes, str)):
        raise ValueError(f"is a {type(data).__name__}, neither base64 nor bytes")
    text = data if isinstance(data, str) else data.decode("ascii")
    return base64.b64decode(text.rpartition(",")[2], validate=False)
