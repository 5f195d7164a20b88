"""Reads the media of a record's columns: finds files by their paths, and takes images and bytes it holds itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.data_files.json_values import json_cell, json_type
from finetune.readers import embedded_media
from finetune.readers.embedded_media import A_FILE
from finetune.sample import DataError, Media, MediaKind
from finetune.utils.file_types import is_file, is_folder, is_special
from finetune.utils.quoting import reason, shown, truncate_middle

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class MediaFolders:
    """Base folders of relative media paths.

    Attributes:
        folders: absolute paths, in search order.
        flag: the flag that adds a folder, for errors.
        allowed: with --strict_paths the folders (symlinks resolved) that every file must be in; None for no limit.
    """

    folders: tuple[Path, ...]
    flag: str = "--image_root"
    allowed: tuple[Path, ...] | None = None


def media_folders(*folders: str | Path | None, flag: str = "--image_root", strict: bool = False) -> MediaFolders:
    """The given folders, in order, and the current directory, as absolute paths.

    With ``strict`` only the given ones, and files outside of them are refused.
    """
    found = [Path(folder).resolve() for folder in folders if folder is not None]
    if strict:
        return MediaFolders(tuple(dict.fromkeys(found)), flag, tuple(found))
    return MediaFolders(tuple(dict.fromkeys([*found, Path.cwd()])), flag)


def find_media_file(path: str, kind: MediaKind, where: MediaFolders) -> Path:
    """The file of a path.

    Raises:
        DataError: it does not exist, cannot be accessed, is a URL, or is outside of the allowed folders.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if _REMOTE.match(path):
        raise DataError(f"{kind} {shown(path)} is a URL, and media are not downloaded; download it and give its path")
    tried = [Path(path)] if Path(path).is_absolute() else [folder / path for folder in where.folders]
    fault: OSError | ValueError | None = None
    for candidate in tried:
        try:
            candidate.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        # Name too long, folder not accessible, null byte or lone surrogate in the name.
        except (OSError, ValueError) as error:
            fault = fault or error
        else:
            if is_special(candidate):
                raise DataError(f"{kind} {shown(path)} is a pipe, a socket or a device; give a regular file")
            _check_place(candidate, path, kind, where)
            return candidate
    if fault is not None:
        raise DataError(
            f"{kind} {shown(path)} cannot be reached ({reason(fault)}); correct the path or its permissions"
        )
    looked = ", ".join(truncate_middle(str(candidate)) for candidate in tried)
    raise DataError(f"{kind} {shown(path)} does not exist (looked for {looked}); correct the path or give {where.flag}")


def is_there(path: str, where: MediaFolders) -> bool:
    """Whether a file or folder of that path exists in one of the base folders."""
    if not path or _REMOTE.match(path):
        return False
    name = Path(path)
    return any(
        is_file(each) or is_folder(each)
        for each in ([name] if name.is_absolute() else [f / name for f in where.folders])
    )


def _check_place(found: Path, path: str, kind: MediaKind, where: MediaFolders) -> None:
    """Checks with --strict_paths that a file, or the files of a frame folder, are in the allowed folders."""
    if where.allowed is None:
        return
    for each in [found, *(found.iterdir() if found.is_dir() else ())]:
        real = each.resolve()
        if not any(real.is_relative_to(folder) for folder in where.allowed):
            allowed = ", ".join(map(str, where.allowed))
            raise DataError(
                f"{kind} {shown(path)} is {truncate_middle(str(real))}, outside of {allowed}, which --strict_paths "
                f"refuses; move the file there or give {where.flag}"
            )


def is_embedded(value: Any) -> bool:
    """Whether it is an embedded image or file (as in Parquet), not a path."""
    return isinstance(value, (Image.Image, bytes)) or (
        isinstance(value, dict) and bool(value) and set(value) <= {"bytes", "path"}
    )


def read_medium(value: Any, kind: MediaKind, column: str, where: MediaFolders) -> Media:
    """A medium from a path, an image, the bytes of a file or base64 text; a video also from a list of frames.

    Text is base64 if there is no file of that name and it starts with the signature of a file of its kind.

    Args:
        value: value in the record.
        kind: kind of media.
        column: key of the value, for errors.
        where: base folders of relative paths.

    Raises:
        DataError: none of these, or a file that does not exist.
    """
    if isinstance(value, Image.Image):
        return Media(kind, value)
    if kind == "video" and isinstance(value, (list, tuple)):
        return Media(kind, tuple(_frame(each, column, where) for each in value))
    if isinstance(value, dict) and is_embedded(value):
        data = value.get("bytes")
        if data is not None and not isinstance(data, (bytes, str)):
            raise DataError(f"{column!r} has {json_type(data)} under 'bytes'; give base64 text, or a path")
        value = value.get("path") if data is None else embedded_media.bytes_of_value(data, kind)
    if isinstance(value, str) and value.startswith("data:"):
        value = embedded_media.bytes_of_data_url(value, kind)
    elif isinstance(value, str) and embedded_media.is_base64(value) and not is_there(value, where):
        value = embedded_media.bytes_of_base64(value, kind)
    if isinstance(value, bytes):
        return Media(kind, embedded_media.opened(value, kind))
    if not isinstance(value, str) or not value:
        what = "an empty string" if value == "" else json_type(value)
        raise DataError(f"{column!r} has {what} where the path of {A_FILE[kind]} belongs; give a path")
    return Media(kind, find_media_file(value, kind, where))


def _frame(value: Any, column: str, where: MediaFolders) -> Path:
    if not isinstance(value, str) or not value:
        what = "an empty string" if value == "" else json_type(value)
        raise DataError(f"{column!r} has {what} among the frames of a video; give the paths of images")
    return find_media_file(value, "image", where)


def read_media(value: Any, kind: MediaKind, column: str, where: MediaFolders) -> list[Media]:
    """The media of a column: a path, a list of paths, or nothing.

    Raises:
        DataError: as ``read_medium``, or a nested list that is not the frames of a video.
    """
    value = json_cell(value)
    if value is None or value == "":
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    if kind != "video" and any(isinstance(each, (list, tuple)) for each in values):
        raise DataError(f"{column!r} has a list in a list; only videos may be lists, of their frames")
    return [read_medium(each, kind, column, where) for each in values]
