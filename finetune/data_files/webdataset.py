"""WebDataset shards: tar files in which consecutive members with one key are a record; not extracted to disk."""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from finetune.data_files.indexed import IndexedRecords, MisplacedError
from finetune.data_files.json_values import ValueFault, parse
from finetune.sample import MEDIA_COLUMNS, VIDEO_SUFFIXES, DataError, MediaKind
from finetune.utils.errors import located
from finetune.utils.file_types import told
from finetune.utils.quoting import shown, words_of

logger = logging.getLogger(__name__)

SHARD = ".tar"
MOST_BYTES = 1 << 30
"""Maximum size of the members of one record, which are in memory together."""

# Key and extension: the parts before and after the first dot of the base name.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)", re.DOTALL)
_SPANS = 10_000
_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "ppm", "pgm", "qoi", "tga")
_KINDS: dict[str, MediaKind] = {
    **dict.fromkeys(_IMAGES, "image"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "opus", "m4a"), "audio"),
    **dict.fromkeys((suffix[1:] for suffix in VIDEO_SUFFIXES), "video"),
}
_TURNS = ("conversations", "messages", "instruction")
# Keys under which a record may refer to another member of the shard.
_FILES = {*MEDIA_COLUMNS, *MEDIA_COLUMNS.values(), "image_url", "video_url", "audio_url", "url", "path"}


class _Member(NamedTuple):
    """A member (file) of a shard.

    Attributes:
        name: full name with folders.
        ending: extension, after the first dot.
        data: its content.
    """

    name: str
    ending: str
    data: bytes

    @property
    def kind(self) -> MediaKind | None:
        """The kind of media by its last extension; None for other files."""
        return _KINDS.get(self.ending.rpartition(".")[2].lower())


class ShardRecords(IndexedRecords):
    """Records of a tar file: ``KEY.json`` is a record of any format, ``KEY.txt`` the answer to an image without prompt.

    Media members of the same key replace the paths that refer to them; if the record refers to none, they are put under
    the media key of its format. Nothing is extracted to disk, and links are refused.
    """

    @staticmethod
    def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
        return _scan(path, file)

    def _value(self, data: bytes, number: int) -> Any:
        members = _members(data)
        with located(f"{self._path}, record {number} ({shown(members[0].name)})"):
            return record(members)


def read_shard(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the members of each record of a shard, in order.

    Raises:
        DataError: not a tar file, truncated, or members of a key that are not consecutive.
    """
    with path.open("rb") as file:
        for spans in _scan(path, file):
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                yield start, os.pread(file.fileno(), end - start, start)


def value_of(data: bytes) -> Any:
    """The record of the bytes of its members.

    Raises:
        DataError: it cannot be used.
    """
    try:
        return record(_members(data))
    except MisplacedError as error:
        raise DataError("the file has changed during the run; restart it") from error


def of_row(row: dict[str, Any], source: object) -> dict[str, Any]:
    """The record of a WebDataset row of the ``datasets`` library (with ``__key__``); other rows are unchanged.

    Raises:
        DataError: it cannot be used.
    """
    key = row.get("__key__")
    if not isinstance(key, str):
        return row
    members = []
    for ending, value in row.items():
        if not ending.startswith("__"):
            data = value.get("bytes") if isinstance(value, dict) and set(value) == {"bytes", "path"} else value
            if not isinstance(data, bytes):
                data = (data if isinstance(data, str) else json.dumps(data)).encode()
            members.append(_Member(f"{key}.{ending}", ending, data))
    with located(f"{source} ({shown(key)})"):
        return record(members)


def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
    """(start, end) offsets of the members of every key, in the order of the shard."""
    spans: array[int] = array("q")
    keys: set[str] = set()
    last, start, skipped = None, 0, 0
    for member, end in _headers(path, file):
        found = _NAME.fullmatch(member.name)
        if found is None:
            skipped += 1
            continue
        if found["key"] != last:
            last, start = found["key"], member.offset
            if last in keys:
                raise DataError(
                    f"{path}: the members of the key {shown(last)} are not consecutive; write the members of a key "
                    "one after another, sorted by name"
                )
            keys.add(last)
            spans.extend((start, end))
        spans[-1] = end
        if end - start > MOST_BYTES:
            raise DataError(f"{path}: the members of the key {shown(last)} have more than 1 GiB; remove them")
        if len(spans) > _SPANS:  # the last span may still grow
            yield spans[:-2]
            spans = spans[-2:]
    if skipped:
        logger.warning("%s: %d members without key and extension (KEY.json) are skipped", path, skipped)
    if not spans:
        raise DataError(f"{path}: the shard has no member KEY.json or KEY.txt; is it a WebDataset?")
    yield spans


def _headers(path: Path, file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members of a tar file, each with its end offset."""
    file.seek(0)
    if (kind := told(file.read(512))) is not None and "tar archive" not in kind:
        raise DataError(f"{path}: {kind}")
    size, end = file.seek(0, 2), 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            while _has_header(file, end):
                # Read one by one: TarFile keeps all members it has returned in memory.
                member = tarfile.TarInfo.fromtarfile(shard)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.issparse() or not (member.isreg() or member.isdir()):
                    raise DataError(
                        f"{path}: {shown(member.name)} is a link or a device; a shard has regular files only"
                    )
                if member.offset_data + member.size > size:
                    raise DataError(f"{path}: the shard ends within {shown(member.name)}; was it copied completely?")
                if member.isreg():
                    yield member, end
    except tarfile.TarError as error:
        raise DataError(f"{path}: cannot be read as a tar file ({error}); was it copied completely?") from error


def _has_header(file: BinaryIO, at: int) -> bool:
    """Whether there is a header (not zero blocks) at an offset; the file position is left there."""
    file.seek(at)
    there = file.read(tarfile.BLOCKSIZE).strip(b"\0")
    file.seek(at)
    return bool(there)


def _members(data: bytes) -> list[_Member]:
    """The members of one record.

    Raises:
        MisplacedError: not a tar file.
    """
    found = []
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as shard:
            for member in shard:
                name, opened = _NAME.fullmatch(member.name), shard.extractfile(member) if member.isreg() else None
                if name is not None and opened is not None:
                    found.append(_Member(member.name, name["ending"], opened.read()))
    except tarfile.TarError as error:
        raise MisplacedError from error
    if not found:
        raise MisplacedError
    return found


def record(members: list[_Member]) -> dict[str, Any]:
    """The record of the members of a key.

    Args:
        members: the members.

    Raises:
        DataError: no json or txt member, or not a JSON object.
    """
    given = {member.ending.lower(): member for member in members}
    if "json" not in given and "txt" not in given:
        raise DataError(f"has {words_of(given)} and no json or txt; add one, or remove the key")
    made = _object(given["json"]) if "json" in given else {}
    _take_places(made, rest := [member for member in members if member.ending.lower() != "json"])
    if "txt" in given and not any(made.get(name) is not None for name in _TURNS):
        rest.remove(given["txt"])
        answer = _text(given["txt"])
        made["conversations"] = [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]
    for kind, column in MEDIA_COLUMNS.items():
        media = [member for member in rest if member.kind == kind]
        key = column if _has_columns(made) else kind
        if media and made.get(key) is None:
            made[key] = [_inside(member) for member in media]
            rest = [member for member in rest if member.kind != kind]
    # Remaining members become keys, which are reported as unread.
    made.update({member.ending: member.data if member.kind else _text(member) for member in rest})
    key = members[0].name.removesuffix(f".{members[0].ending}")
    return {**made, "id": made["id"] if made.get("id") is not None else key}


def _object(member: _Member) -> dict[str, Any]:
    try:
        value = parse(member.data)
    except ValueFault as error:
        raise DataError(f"{member.name} {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{member.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{member.name} is not an object; a record has keys")
    return value


def _text(member: _Member) -> str:
    try:
        return member.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{member.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _inside(member: _Member) -> dict[str, Any]:
    return {"bytes": member.data, "path": member.name}


def _has_columns(made: Mapping[str, Any]) -> bool:
    """Whether the record uses media columns (``images``), as all formats but the official one."""
    if made.get("conversations") is None and made.get("messages") is None:
        return True
    turns = made.get("messages") or made.get("conversations")
    parts = any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns or ())
    return parts or any(made.get(name) for name in ("system", "tools", *MEDIA_COLUMNS.values()))


def _take_places(value: Any, rest: list[_Member], key: str = "") -> Any:
    """Replaces references in a record by the members with that name or extension, which are removed from ``rest``."""
    if isinstance(value, dict):
        for name, each in value.items():
            value[name] = _take_places(each, rest, name if name in _FILES or not isinstance(each, str) else "")
    elif isinstance(value, list):
        value[:] = [_take_places(each, rest, key) for each in value]
    elif isinstance(value, str) and key in _FILES:
        named = value.rpartition("/")[2]
        for member in rest:
            if member.kind and (member.name == value or named in (member.name.rpartition("/")[2], member.ending)):
                rest.remove(member)
                return _inside(member)
    return value
