"""Reports keys of records that are not read, with similar known keys, and refuses unread keys that contain media."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from finetune.data_files.json_values import json_cell
from finetune.readers import record_keys
from finetune.readers.embedded_media import A_FILE, kind_of, kind_of_text
from finetune.readers.forms import Form
from finetune.readers.record_media import MediaFolders
from finetune.sample import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    MEDIA_COLUMNS,
    UNREAD,
    VIDEO_SUFFIXES,
    DataError,
    MediaKind,
    Sample,
)
from finetune.utils.quoting import shown

_SUFFIXES: dict[str, MediaKind] = {
    **dict.fromkeys(AUDIO_SUFFIXES, "audio"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
}
# Words in key names that suggest media.
_MEDIA_NAMES = re.compile(r"image|img|pic|photo|video|clip|frame|audio|sound|speech", re.IGNORECASE)
_DATA_ADDRESS = re.compile(r"data:(image|video|audio)/")
_REMOTE = re.compile(r"https?://", re.IGNORECASE)
_LONG = 200
"""Length from which text may be a base64 file and not a file name."""
_LONGEST_PATH = 4096
_DEEPEST, _MOST = 4, 64
"""Maximum depth, and maximum entries per list, that are searched for media."""
_NEAR = 0.8
UNREAD_IN_RECORD, UNREAD_IN_TURNS, UNREAD_IN_PARTS = (
    f"keys{of} {UNREAD}" for of in ("", " of turns", " of parts of content lists")
)
"""Start of the notes; a colon and the key follow."""


class _Found(NamedTuple):
    """A key that is not read.

    Attributes:
        head: start of its note.
        key: the key.
        value: its value.
        place: the turn, as prefix of a message; "" at the top level of a record.
        known: the keys that are read at this level.
    """

    head: str
    key: str
    value: Any
    place: str
    known: frozenset[str]


def unread_notes(record: Mapping[str, Any], sample: Sample, form: Form, where: MediaFolders) -> tuple[str, ...]:
    """One note per key of a record that is not read; empty values do not count.

    Args:
        record: the record as stored in the file.
        sample: its sample.
        form: format of the record.
        where: base folders of media files.

    Raises:
        DataError: an unread key contains media: the path of an existing file (or, under a key named like media, of a
            missing one), a ``data:`` URL, or the bytes of a file.
    """
    notes: dict[str, None] = {}
    for found in _found(record, form):
        if found.value is None or found.value in ("", [], {}):
            continue
        for leaf in _leaves(found.value, _DEEPEST):
            if (kind := _medium(leaf, found.key, sample, where)) is not None:
                short = isinstance(leaf, str) and len(leaf) < _LONG
                has = shown(leaf, 60) if short else f"{A_FILE[kind]} inside it"
                raise DataError(
                    f"{found.place}the key {shown(found.key, 60)} is not read, but contains {has}; "
                    f"{_remedy(kind, found, form)}, or remove it if the model should not see it"
                )
        notes[_note(found.head, found.key, found.known)] = None
    return tuple(sorted(notes))


def misspelled(record: Mapping[str, Any], form: Form) -> str:
    """A hint about keys of a record that are not read and are spelled nearly like one that is; "" for none."""
    known = record_keys.record_keys(form)
    near = {
        key: difflib.get_close_matches(str(key), known - record.keys(), n=1, cutoff=_NEAR)
        for key in record.keys() - known
    }
    hints = [
        f"the key {shown(key, 60)} is not read: did you mean {shown(close[0])}?" for key, close in near.items() if close
    ]
    return " ".join(sorted(hints))


def _found(record: Mapping[str, Any], form: Form) -> Iterator[_Found]:
    """The unread keys of a record, of its turns and of their content parts."""
    known = record_keys.record_keys(form)
    for key in record.keys() - known:
        yield _Found(UNREAD_IN_RECORD, key, record[key], "", known)
    if form.name in ("alpaca", "duplex"):
        return
    known = record_keys.turn_keys(form)
    for number, turn in enumerate(_turns(record, form)):
        place = f"turn {number}: "
        if not turn.keys() <= known:
            for key in turn.keys() - known:
                yield _Found(UNREAD_IN_TURNS, key, turn[key], place, known)
        content = turn.get(form.tags.content_tag)
        for part in content if isinstance(content, (list, tuple)) else ():
            of_part = record_keys.part_keys(str(part.get("type")).removesuffix("_url"))
            for key in part.keys() - of_part:
                yield _Found(UNREAD_IN_PARTS, key, part[key], place, of_part)


def _turns(record: Mapping[str, Any], form: Form) -> Sequence[Mapping[str, Any]]:
    names = record_keys.TURN_LISTS if form.name == "official" else (form.columns.messages,)
    return next((json_cell(record[name]) for name in names if name and record.get(name) is not None), ())


def _medium(leaf: Any, key: str, sample: Sample, where: MediaFolders) -> MediaKind | None:
    """The kind of media that a value is; None if it is not media, or the sample has it already."""
    if isinstance(leaf, Image.Image):
        return "image"
    if isinstance(leaf, bytes):
        return kind_of(leaf)
    if address := _DATA_ADDRESS.match(leaf):
        return address[1]  # pyright: ignore[reportReturnType]
    if len(leaf) >= _LONG and (kind := kind_of_text(leaf)) is not None:
        return kind
    return _file(leaf, key, sample, where) if len(leaf) < _LONGEST_PATH and "\n" not in leaf else None


def _file(path: str, key: str, sample: Sample, where: MediaFolders) -> MediaKind | None:
    """The kind of media file that a text names, by its suffix or, under a key named like media, by its existence."""
    kind = _SUFFIXES.get(os.path.splitext(path)[1].lower())
    of_medium = _MEDIA_NAMES.search(key)
    if kind is None and not of_medium:
        return None
    if _exists(path, where):
        name = os.path.basename(path)
        known = any(file.name == name for media in sample.media() for file in media.files)
        return None if known else kind or _kind_of(key)
    # A missing file: reported under a key named like media if the sample has no media of this kind.
    return kind if kind and of_medium and not any(sample.media(kind)) else None


def _exists(path: str, where: MediaFolders) -> bool:
    if _REMOTE.match(path):
        return False
    path = path.removeprefix("file://")
    return any(os.path.isfile(os.path.join(folder, path)) for folder in where.folders)


def _remedy(kind: MediaKind, found: _Found, form: Form) -> str:
    if found.place:
        return f"give the file in the user turn, under {kind!r}"
    if form.name == "duplex":
        return f"place it under {record_keys.DUPLEX!r}"
    if form.name == "official":
        return f"call it {kind!r}"
    column = form.columns.media(kind)
    if column is not None:
        return f"call it {column!r} and put <{kind}> where it belongs"
    return f"name it under columns, {MEDIA_COLUMNS[kind]!r}: {found.key!r}"


def _kind_of(key: str) -> MediaKind:
    """The kind of media by the name of a key."""
    found = _MEDIA_NAMES.search(key)
    word = found[0].lower() if found else ""
    return "audio" if word in ("audio", "sound", "speech") else "video" if word in ("video", "clip") else "image"


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    """Texts, bytes and images in a value."""
    if isinstance(value, (str, bytes, Image.Image)):
        yield value
    elif depth and isinstance(value, (dict, list, tuple)):
        entries = list(value.values()) if isinstance(value, dict) else value
        for entry in entries[:_MOST]:
            yield from _leaves(entry, depth - 1)


@lru_cache(4096)
def _note(head: str, key: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(key.lower(), sorted(known), 1, cutoff=_NEAR)
    return f"{head}: {shown(key, 60)}" + (f" (did you mean {near[0]!r}?)" if near else "")
