"""Shards of WebDataset: tar files in which neighbouring files of one key are a record, read in place."""

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
from finetune.utils.file_types import told
from finetune.utils.quoting import shown, words_of

logger = logging.getLogger(__name__)

SHARD = ".tar"
MOST_BYTES = 1 << 30
"""Of the files of one record: all of them are in memory together."""

# Key and ending: what stands before and behind the first dot of the file's own name.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)", re.DOTALL)
_SPANS = 10_000
_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "ppm", "pgm", "qoi", "tga")
_KINDS: dict[str, MediaKind] = {
    **dict.fromkeys(_IMAGES, "image"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "opus", "m4a"), "audio"),
    **dict.fromkeys((suffix[1:] for suffix in VIDEO_SUFFIXES), "video"),
}
_TURNS = ("conversations", "messages", "instruction")
# Where a record may name a file that is in the shard beside it.
_FILES = {*MEDIA_COLUMNS, *MEDIA_COLUMNS.values(), "image_url", "video_url", "audio_url", "url", "path"}


class _Member(NamedTuple):
    """A file of a shard.

    Attributes:
        name: with its folders.
        ending: behind the first dot.
        data: its content.
    """

    name: str
    ending: str
    data: bytes

    @property
    def kind(self) -> MediaKind | None:
        """Which medium it is, by its last ending; None for a file that is none."""
        return _KINDS.get(self.ending.rpartition(".")[2].lower())


class ShardRecords(IndexedRecords):
    """Records of a tar file: ``KEY.json`` is one of any form, or ``KEY.txt`` the answer to the image alone.

    Media of the same key come in the place of the paths that name them, or where the record names none, under the key
    of its form. Nothing is written to disk, links are refused, and names only name.
    """

    @staticmethod
    def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
        return _scan(path, file)

    def _value(self, data: bytes, number: int) -> Any:
        members = _members(data)
        return record(members, f"{self._path}, record {number} ({shown(members[0].name)})")


def read_shard(path: Path) -> Iterator[tuple[int, bytes]]:
    """The bytes of the files of each record of a shard from front to back, with the first of them.

    Raises:
        DataError: no tar file, cut, or files of a key do not stand together.
    """
    with path.open("rb") as file:
        for spans in _scan(path, file):
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                yield start, os.pread(file.fileno(), end - start, start)


def value_of(data: bytes, source: str) -> Any:
    """The record of the bytes of its files.

    Raises:
        DataError: it cannot be taken.
    """
    try:
        return record(_members(data), source)
    except MisplacedError as error:
        raise DataError(f"{source}: the file has changed during the run; start again") from error


def of_row(row: dict[str, Any], source: str) -> dict[str, Any]:
    """The record of a row in which the ``datasets`` library has the files of a key; any other row as it is.

    Raises:
        DataError: it cannot be taken.
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
    return record(members, f"{source} ({shown(key)})")


def _scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
    """First byte and end of the files of every key, in the order of the shard."""
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
                    f"{path}: the files of the key {shown(last)} do not stand together; put the files of a key side by "
                    "side, as archives in the order of names have them"
                )
            keys.add(last)
            spans.extend((start, end))
        spans[-1] = end
        if end - start > MOST_BYTES:
            raise DataError(f"{path}: the files of the key {shown(last)} have more than 1 GiB; leave them out")
        if len(spans) > _SPANS:  # the last one may grow
            yield spans[:-2]
            spans = spans[-2:]
    if skipped:
        logger.warning("%s: %d files without a key and an ending (KEY.json) are not read", path, skipped)
    if not spans:
        raise DataError(f"{path}: the shard has no file KEY.json or KEY.txt; is it a WebDataset?")
    yield spans


def _headers(path: Path, file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The files of a tar file, each with the byte behind it."""
    file.seek(0)
    if (kind := told(file.read(512))) is not None and "tar archive" not in kind:
        raise DataError(f"{path}: {kind}")
    size, end = file.seek(0, 2), 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            while _has_header(file, end):
                # Read one by one: an open tar file keeps all that it gives itself in memory.
                member = tarfile.TarInfo.fromtarfile(shard)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.issparse() or not (member.isreg() or member.isdir()):
                    raise DataError(f"{path}: {shown(member.name)} is a link or a device; a shard has files alone")
                if member.offset_data + member.size > size:
                    raise DataError(f"{path}: the shard ends within {shown(member.name)}; was it copied completely?")
                if member.isreg():
                    yield member, end
    except tarfile.TarError as error:
        raise DataError(f"{path}: cannot be read as a tar file ({error}); was it copied completely?") from error


def _has_header(file: BinaryIO, at: int) -> bool:
    """Whether there is anything at a place but the end, blocks of zeros; the file is left there."""
    file.seek(at)
    there = file.read(tarfile.BLOCKSIZE).strip(b"\0")
    file.seek(at)
    return bool(there)


def _members(data: bytes) -> list[_Member]:
    """The files of one record.

    Raises:
        MisplacedError: no tar file.
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


def record(members: list[_Member], source: str) -> dict[str, Any]:
    """The record of the files of a key.

    Args:
        members: the files.
        source: names the record in errors.

    Raises:
        DataError: no text belongs to the media, or it is no object of JSON.
    """
    given = {member.ending.lower(): member for member in members}
    if "json" not in given and "txt" not in given:
        raise DataError(f"{source}: has {words_of(given)} and no json or txt; give it a record, or leave the key out")
    made = _object(given["json"], source) if "json" in given else {}
    _take_places(made, rest := [member for member in members if member.ending.lower() != "json"])
    if "txt" in given and not any(made.get(name) is not None for name in _TURNS):
        rest.remove(given["txt"])
        answer = _text(given["txt"], source)
        made["conversations"] = [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]
    for kind, column in MEDIA_COLUMNS.items():
        media = [member for member in rest if member.kind == kind]
        key = column if _has_columns(made) else kind
        if media and made.get(key) is None:
            made[key] = [_inside(member) for member in media]
            rest = [member for member in rest if member.kind != kind]
    # What nobody asked for is a key like any other that nobody reads.
    made.update({member.ending: member.data if member.kind else _text(member, source) for member in rest})
    key = members[0].name.removesuffix(f".{members[0].ending}")
    return {**made, "id": made["id"] if made.get("id") is not None else key}


def _object(member: _Member, source: str) -> dict[str, Any]:
    try:
        value = parse(member.data)
    except ValueFault as error:
        raise DataError(f"{source}: {member.name} {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: {member.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{source}: {member.name} is not an object; a record has keys")
    return value


def _text(member: _Member, source: str) -> str:
    try:
        return member.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: {member.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _inside(member: _Member) -> dict[str, Any]:
    return {"bytes": member.data, "path": member.name}


def _has_columns(made: Mapping[str, Any]) -> bool:
    """Whether the record has its media in columns of their own, as all forms but the official one have."""
    if made.get("conversations") is None and made.get("messages") is None:
        return True
    turns = made.get("messages") or made.get("conversations")
    parts = any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns or ())
    return parts or any(made.get(name) for name in ("system", "tools", *MEDIA_COLUMNS.values()))


def _take_places(value: Any, rest: list[_Member], key: str = "") -> Any:
    """Puts files of the shard into the places of a record that name them, by name or by ending; they leave the rest."""
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
