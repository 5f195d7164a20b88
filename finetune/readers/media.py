"""Media of records: paths become files that exist, embedded bytes become pictures."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from finetune.sample import DataError, Media, MediaKind, Source

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Places:
    """Folders in which relative paths are looked for.

    Attributes:
        folders: absolute, in the order of the search.
        flag: what a user gives to name another one.
    """

    folders: tuple[Path, ...]
    flag: str = "--image_root"


def places(*folders: str | Path | None, flag: str = "--image_root") -> Places:
    """The folders that are given, in order, and the current one; a later change of directory moves nothing."""
    found = [Path(folder).resolve() for folder in folders if folder is not None]
    return Places(tuple(dict.fromkeys([*found, Path.cwd()])), flag)


def find(path: str, kind: MediaKind, source: Source, where: Places) -> Path:
    """The file of a path.

    Raises:
        DataError: it is nowhere, or at a remote address.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if _REMOTE.match(path):
        raise DataError(
            f"{source}: {kind} {path!r} is a remote address, and nothing is fetched from the network; download the "
            "file and give its path"
        )
    tried = [Path(path)] if Path(path).is_absolute() else [folder / path for folder in where.folders]
    for candidate in tried:
        if candidate.exists():
            return candidate
    looked = ", ".join(str(candidate) for candidate in tried)
    raise DataError(
        f"{source}: {kind} {path!r} does not exist (looked for {looked}); correct the path or give {where.flag}"
    )


def is_embedded(value: Any) -> bool:
    """Whether it is a picture or the bytes of a file, as Parquet files hold them, and no path."""
    return isinstance(value, Image.Image) or (
        isinstance(value, dict) and bool(value) and set(value) <= {"bytes", "path"}
    )


def one(value: Any, kind: MediaKind, column: str, source: Source, where: Places) -> Media:
    """A medium from a path, a ``data:`` address, a picture, or the bytes of a file; a video also from its frames.

    Args:
        value: what the record has.
        kind: what it is.
        column: where the record has it, named in errors.
        source: named in errors.
        where: for relative paths.

    Raises:
        DataError: none of these, or a file that does not exist.
    """
    if isinstance(value, Image.Image):
        return Media(kind, value)
    if kind == "video" and isinstance(value, (list, tuple)):
        return Media(kind, tuple(_frame(each, column, source, where) for each in value))
    if is_embedded(value):
        if value.get("bytes") is not None:
            return Media(kind, _decoded(value["bytes"], kind, source))
        value = value["path"]
    if isinstance(value, str) and value.startswith("data:"):
        return Media(kind, _decoded(_base64(value, kind, source), kind, source))
    if not isinstance(value, str) or not value:
        what = "an empty string" if value == "" else json_type(value)
        raise DataError(f"{source}: {column!r} has {what} where the path of {A_FILE[kind]} belongs; give a path")
    return Media(kind, find(value, kind, source, where))


def _frame(value: Any, column: str, source: Source, where: Places) -> Path:
    if not isinstance(value, str) or not value:
        what = "an empty string" if value == "" else json_type(value)
        raise DataError(f"{source}: {column!r} has {what} among the frames of a video; give the paths of pictures")
    return find(value, "image", source, where)


A_FILE: dict[MediaKind, str] = {"image": "an image", "video": "a video", "audio": "an audio file"}


def listed(value: Any, kind: MediaKind, column: str, source: Source, where: Places) -> list[Media]:
    """The media of a column: a path, a list of paths, or nothing.

    Raises:
        DataError: as ``one``; a list in a list where it is not the frames of a video.
    """
    value = json_cell(value)
    if value is None or value == "":
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    if kind != "video" and any(isinstance(each, (list, tuple)) for each in values):
        raise DataError(f"{source}: {column!r} has a list in a list; only videos may be lists, of their frames")
    return [one(each, kind, column, source, where) for each in values]


def _base64(address: str, kind: MediaKind, source: Source) -> bytes:
    head, _, body = address.partition(",")
    try:
        if head.endswith(";base64"):
            return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"{source}: {kind} {address[:40]!r}...: not base64 ({error})") from error
    raise DataError(f"{source}: {kind} {address[:40]!r}...: only base64 is read of data: addresses; give a path")


def _decoded(data: bytes, kind: MediaKind, source: Source) -> Image.Image | bytes:
    """A picture with its header read, or sound as it is; the encoder decodes the rest."""
    if kind == "audio":
        return data
    if kind != "image":
        raise DataError(
            f"{source}: {A_FILE[kind]} of {len(data)} bytes inside the record; write it to a file, give its path"
        )
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DataError(
            f"{source}: an image of {len(data)} bytes inside the record is in no format that Pillow reads"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: an image of {len(data)} bytes inside the record is damaged ({error})") from error


def json_cell(value: Any) -> Any:
    """The list or object of a cell of CSV, which holds it as JSON text; every other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value  # a path may begin like this too
    return value


def json_type(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names: Sequence[tuple[type | tuple[type, ...], str]] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (dict, "an object"),
        ((list, tuple), "a list"),
        (type(None), "null"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), f"a value of type {type(value).__name__}")
