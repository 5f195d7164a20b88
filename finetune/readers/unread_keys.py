"""Keys of records that nothing reads: counted, with the name that may be meant, and refused where they hold media."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from finetune.readers import record_keys
from finetune.readers.embedded_media import A_FILE, kind_of, kind_of_text
from finetune.readers.forms import Form
from finetune.readers.record_media import Places, json_cell
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
# Words in the names under which people keep media.
_MEDIA_NAMES = re.compile(r"image|img|pic|photo|video|clip|frame|audio|sound|speech", re.IGNORECASE)
_DATA_ADDRESS = re.compile(r"data:(image|video|audio)/")
_REMOTE = re.compile(r"https?://", re.IGNORECASE)
_LONG = 200
"""Letters from which on text can be a file in base64, and no name of a file in a record."""
_LONGEST_PATH = 4096
_DEEPEST, _MOST = 4, 64
"""How deep a value is looked through, and how many entries of each list."""
_NEAR = 0.8
HEAD, HEAD_OF_TURNS, HEAD_OF_PARTS = (f"keys{of} {UNREAD}" for of in ("", " of turns", " of parts of content lists"))
"""What notes begin with; behind it and a colon stands the key."""


class _Found(NamedTuple):
    """A key that nothing reads.

    Attributes:
        head: of its note.
        key: itself.
        value: what it has.
        place: the turn, in front of a message; "" at the top of a record.
        known: the keys that are read in its place.
    """

    head: str
    key: str
    value: Any
    place: str
    known: frozenset[str]


def unread_notes(record: Mapping[str, Any], sample: Sample, form: Form, where: Places) -> tuple[str, ...]:
    """One sentence per key of a record that nothing reads; keys without content have nothing to read.

    Args:
        record: as it stands in the file.
        sample: what it means.
        form: of the records.
        where: places of media files.

    Raises:
        DataError: a key has a medium: the path of a file that exists or, by the name of the key, was to exist, a data
            address, or the bytes of a file.
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
                    f"{sample.source}: {found.place}nothing reads the key {shown(found.key, 60)}, which has {has}; "
                    f"{_remedy(kind, found, form)}, or take it out if the model is not to have it"
                )
        notes[_note(found.head, found.key, found.known)] = None
    return tuple(sorted(notes))


def _found(record: Mapping[str, Any], form: Form) -> Iterator[_Found]:
    """The keys of a record, of its turns and of the parts of their contents that no table names."""
    known = record_keys.record_keys(form)
    for key in record.keys() - known:
        yield _Found(HEAD, key, record[key], "", known)
    if form.name == "alpaca":
        return
    known = record_keys.turn_keys(form)
    for number, turn in enumerate(_turns(record, form)):
        place = f"turn {number}: "
        if not turn.keys() <= known:
            for key in turn.keys() - known:
                yield _Found(HEAD_OF_TURNS, key, turn[key], place, known)
        content = turn.get(form.tags.content_tag)
        for part in content if isinstance(content, (list, tuple)) else ():
            of_part = record_keys.part_keys(str(part.get("type")).removesuffix("_url"))
            for key in part.keys() - of_part:
                yield _Found(HEAD_OF_PARTS, key, part[key], place, of_part)


def _turns(record: Mapping[str, Any], form: Form) -> Sequence[Mapping[str, Any]]:
    names = record_keys.TURN_LISTS if form.name == "official" else (form.columns.messages,)
    return next((json_cell(record[name]) for name in names if name and record.get(name) is not None), ())


def _medium(leaf: Any, key: str, sample: Sample, where: Places) -> MediaKind | None:
    """The kind of the medium that a value is; None where it is none, or the sample has it already."""
    if isinstance(leaf, Image.Image):
        return "image"
    if isinstance(leaf, bytes):
        return kind_of(leaf)
    if address := _DATA_ADDRESS.match(leaf):
        return address[1]  # pyright: ignore[reportReturnType]
    if len(leaf) >= _LONG and (kind := kind_of_text(leaf)) is not None:
        return kind
    return _file(leaf, key, sample, where) if len(leaf) < _LONGEST_PATH and "\n" not in leaf else None


def _file(path: str, key: str, sample: Sample, where: Places) -> MediaKind | None:
    """The kind of file that a text names by its ending or, where the key has the name of a medium, by being one."""
    kind = _SUFFIXES.get(os.path.splitext(path)[1].lower())
    of_medium = _MEDIA_NAMES.search(key)
    if kind is None and not of_medium:
        return None
    if _exists(path, where):
        name = os.path.basename(path)
        known = any(file.name == name for media in sample.media() for file in media.files)
        return None if known else kind or _kind_of(key)
    # A name that is no file here: of what the model was to see, unless it has something to see.
    return kind if kind and of_medium and not any(sample.media(kind)) else None


def _exists(path: str, where: Places) -> bool:
    if _REMOTE.match(path):
        return False
    path = path.removeprefix("file://")
    return any(os.path.isfile(os.path.join(folder, path)) for folder in where.folders)


def _remedy(kind: MediaKind, found: _Found, form: Form) -> str:
    if found.place:
        return f"give the file in the user turn, under {kind!r}"
    if form.name == "official":
        return f"call it {kind!r}"
    column = form.columns.media(kind)
    if column is not None:
        return f"call it {column!r} and put <{kind}> where it belongs"
    return f"name it under columns, {MEDIA_COLUMNS[kind]!r}: {found.key!r}"


def _kind_of(key: str) -> MediaKind:
    """The kind of medium in the name of a key."""
    found = _MEDIA_NAMES.search(key)
    word = found[0].lower() if found else ""
    return "audio" if word in ("audio", "sound", "speech") else "video" if word in ("video", "clip") else "image"


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    """Texts, bytes and pictures in a value."""
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
