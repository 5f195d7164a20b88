"""Media of records: paths become files that exist, what is inside of the record becomes pictures and sound."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.data_files.json_values import parse
from finetune.readers import embedded_media
from finetune.readers.embedded_media import A_FILE
from finetune.sample import DataError, Media, MediaKind, Source
from finetune.utils.file_types import is_file, is_folder, is_special
from finetune.utils.quoting import cut, reason, shown

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Places:
    """Folders in which relative paths are looked for.

    Attributes:
        folders: absolute, in the order of the search.
        flag: what a user gives to name another one.
        allowed: with --strict_paths the folders, links followed, in which every file must lie; None for anywhere.
    """

    folders: tuple[Path, ...]
    flag: str = "--image_root"
    allowed: tuple[Path, ...] | None = None


def places(*folders: str | Path | None, flag: str = "--image_root", strict: bool = False) -> Places:
    """The folders that are given, in order, and the current one; a later change of directory moves nothing.

    With ``strict`` those given alone, and no file outside of them is taken.
    """
    found = [Path(folder).resolve() for folder in folders if folder is not None]
    if strict:
        return Places(tuple(dict.fromkeys(found)), flag, tuple(found))
    return Places(tuple(dict.fromkeys([*found, Path.cwd()])), flag)


def find(path: str, kind: MediaKind, source: Source, where: Places) -> Path:
    """The file of a path.

    Raises:
        DataError: it is nowhere, cannot be reached, is at a remote address, or outside of the places that are allowed.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if _REMOTE.match(path):
        raise DataError(
            f"{source}: {kind} {shown(path)} is a remote address, and nothing is fetched from the network; download "
            "the file and give its path"
        )
    tried = [Path(path)] if Path(path).is_absolute() else [folder / path for folder in where.folders]
    fault: OSError | ValueError | None = None
    for candidate in tried:
        try:
            candidate.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        # A name that is too long, a folder that may not be entered, a null byte or half a surrogate pair in the name.
        except (OSError, ValueError) as error:
            fault = fault or error
        else:
            if is_special(candidate):
                raise DataError(f"{source}: {kind} {shown(path)} is a pipe, a socket or a device; give a regular file")
            _check_place(candidate, path, kind, source, where)
            return candidate
    if fault is not None:
        raise DataError(
            f"{source}: {kind} {shown(path)} cannot be reached ({reason(fault)}); correct the path or its permissions"
        )
    looked = ", ".join(cut(str(candidate)) for candidate in tried)
    raise DataError(
        f"{source}: {kind} {shown(path)} does not exist (looked for {looked}); correct the path or give {where.flag}"
    )


def is_there(path: str, where: Places) -> bool:
    """Whether a file or a folder of that name is in one of the places."""
    if not path or _REMOTE.match(path):
        return False
    name = Path(path)
    return any(
        is_file(each) or is_folder(each)
        for each in ([name] if name.is_absolute() else [f / name for f in where.folders])
    )


def _check_place(found: Path, path: str, kind: MediaKind, source: Source, where: Places) -> None:
    """With --strict_paths a file, and what is in a folder of frames, lies in the places that are allowed."""
    if where.allowed is None:
        return
    for each in [found, *(found.iterdir() if found.is_dir() else ())]:
        real = each.resolve()
        if not any(real.is_relative_to(folder) for folder in where.allowed):
            allowed = ", ".join(map(str, where.allowed))
            raise DataError(
                f"{source}: {kind} {shown(path)} is {cut(str(real))}, outside of {allowed}, and --strict_paths allows "
                f"no other place; move the file there or give {where.flag}"
            )


def is_embedded(value: Any) -> bool:
    """Whether it is a picture or the bytes of a file, as Parquet files hold them, and no path."""
    return isinstance(value, (Image.Image, bytes)) or (
        isinstance(value, dict) and bool(value) and set(value) <= {"bytes", "path"}
    )


def one(value: Any, kind: MediaKind, column: str, source: Source, where: Places) -> Media:
    """A medium from a path, a picture, or the bytes of a file, also as base64 text; a video also from its frames.

    Text is taken for base64 when there is no file of that name and it begins as a file of its kind does.

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
    if isinstance(value, dict) and is_embedded(value):
        data = value.get("bytes")
        if data is not None and not isinstance(data, (bytes, str)):
            raise DataError(f"{source}: {column!r} has {json_type(data)} under 'bytes'; give base64 text, or a path")
        value = value.get("path") if data is None else embedded_media.of_value(data, kind, source)
    if isinstance(value, str) and value.startswith("data:"):
        value = embedded_media.of_address(value, kind, source)
    elif isinstance(value, str) and embedded_media.is_base64(value) and not is_there(value, where):
        value = embedded_media.of_text(value, kind, source)
    if isinstance(value, bytes):
        return Media(kind, embedded_media.decoded(value, kind, source))
    if not isinstance(value, str) or not value:
        what = "an empty string" if value == "" else json_type(value)
        raise DataError(f"{source}: {column!r} has {what} where the path of {A_FILE[kind]} belongs; give a path")
    return Media(kind, find(value, kind, source, where))


def _frame(value: Any, column: str, source: Source, where: Places) -> Path:
    if not isinstance(value, str) or not value:
        what = "an empty string" if value == "" else json_type(value)
        raise DataError(f"{source}: {column!r} has {what} among the frames of a video; give the paths of pictures")
    return find(value, "image", source, where)


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


def json_cell(value: Any) -> Any:
    """The list or object of a cell of CSV, which holds it as JSON text; every other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse(value)
        except ValueError:
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
