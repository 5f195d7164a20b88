"""Format of the official finetuning scripts: ``id``, ``image`` (also ``video``, ``audio``) and ``conversations``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from finetune.data_files.json_values import json_cell, json_type
from finetune.readers import foreign_placeholders, record_keys, tool_calls
from finetune.readers.conversation import Conversation, TrainOn, assemble, joined, own_placed, with_system
from finetune.readers.embedded_media import A_FILE
from finetune.readers.forms import CALLING
from finetune.readers.record_media import MediaFolders, is_embedded, read_medium
from finetune.readers.turns import Turn, complete, state, text_of, turn_list
from finetune.sample import MEDIA_COLUMNS, MEDIA_KINDS, DataError, Media, MediaKind, Part, Text
from finetune.utils.quoting import shown, truncate_middle, words_of

_TAG = re.compile(r"<(?:image|video|audio)(?:_\d+)?>")
_SHAREGPT = {"human": "user", "gpt": "assistant"}


_Files = dict[str, Media] | list[Media]
"""Files by tag, or in order."""


def conversation(record: Mapping[str, Any], where: MediaFolders, train_on: TrainOn) -> Conversation:
    """The conversation of a record.

    ``image`` is a path (tag ``<image>``), a list of paths (one ``<image>`` per path, in order), a dictionary from
    ``<image_00>``, ``<image_01>``, ... to paths (each tag once, anywhere), or absent. Without tags the images precede
    the first user turn, each followed by a newline. ``video`` and ``audio`` work in the same way with their own tags;
    without tags images come first, then videos. A user turn may have its own files, which replace its tags or precede
    its text. Tags count in user turns only and are plain text elsewhere. Turns have ``role`` and ``content``, or
    ``from`` and ``value`` (human, gpt). Every assistant turn is trained, or with ``train_on`` "last" the last one of
    the conversation, unless it has ``loss`` 0.

    Raises:
        DataError: the record is not in the official format, or a media file does not exist.
    """
    for key in MEDIA_COLUMNS.values():
        if record.get(key):
            raise DataError(
                f"has {key!r}, which the official format does not support; paths belong under {key[:-1]!r} "
                "(or the file is of another form: --data_format sharegpt)"
            )
    turns = with_system(joined(_turns(record, where)), record, record_keys.SYSTEM)
    files: dict[MediaKind, _Files] = {kind: _files(kind, json_cell(record.get(kind)), where) for kind in MEDIA_KINDS}
    turns, files = foreign_placeholders.to_tags(turns, files, where, _TAG)
    placed = _place(turns, files)
    return assemble(turns, placed, tool_calls.read_tools(record, record_keys.TOOLS), train_on)


def _turns(record: Mapping[str, Any], where: MediaFolders) -> list[Turn]:
    """The turns, with validated values."""
    key = "messages" if record.get("conversations") is None and record.get("messages") is not None else "conversations"
    if record.get("conversations") is not None and record.get("messages") is not None:
        raise DataError("has 'conversations' and 'messages', two lists of turns; keep one")
    result = []
    for number, turn in enumerate(turn_list(record, key)):
        # Rows of tables have every key in every turn, null if unused.
        tagged = turn.get("from") is not None and turn.get("role") is None
        names = ("from", "value") if tagged else ("role", "content")
        if turn.get("from") is not None and not tagged:
            raise DataError(f"turn {number} has 'role' and 'from', two names for who speaks; keep one")
        role = turn.get(names[0])
        if not isinstance(role, str):
            raise DataError(f"turn {number}: {state(turn, names[0])}; it must be a string")
        role = CALLING.get(role, _SHAREGPT.get(role, role) if tagged else role)
        result.append(complete(turn, role, text_of(turn, names[1], number), number, where))
    return result


def _files(kind: MediaKind, given: Any, where: MediaFolders) -> _Files:
    """The files of a kind, by tag if the record has tags, else in order."""
    if given is None:
        return []
    if isinstance(given, dict) and not is_embedded(given):
        for tag in given:
            if _kind(tag) != kind or not _TAG.fullmatch(tag):
                raise DataError(f"{kind!r} has the key {shown(tag, 60)}; keys must look like <{kind}_00>")
        return {tag: _medium(kind, path, where) for tag, path in given.items() if path is not None}
    return [_medium(kind, path, where) for path in (given if isinstance(given, (list, tuple)) else [given])]


def _medium(kind: MediaKind, given: Any, where: MediaFolders) -> Media:
    frames = kind == "video" and isinstance(given, (list, tuple))
    if not frames and not is_embedded(given) and (not isinstance(given, str) or not given):
        what = "an empty string" if given == "" else json_type(given)
        without = "a text-only record" if kind == "image" else "a record without"
        raise DataError(f"{A_PATH[kind]} is {what}; give a path, or leave {kind!r} out of {without}")
    return read_medium(given, kind, kind, where)


A_PATH: dict[MediaKind, str] = {"image": "an image path", "video": "a video path", "audio": "an audio path"}


def _kind(tag: str) -> str:
    """The kind of a tag."""
    return tag.strip("<>").partition("_")[0]


def _place(turns: Sequence[Turn], files: Mapping[MediaKind, _Files]) -> list[tuple[Part, ...]]:
    """The parts of every turn, with files in place of their tags; files of a kind without tags come first."""
    # Turns of this format are text, so they have no slots.
    own = [cast("tuple[Part, ...]", own_placed(turn, number)) for number, turn in enumerate(turns)]
    asked = [parts if turn.role == "user" else () for turn, parts in zip(turns, own, strict=True)]
    found = [tag for parts in asked for part in parts if isinstance(part, Text) for tag in _TAG.findall(part.text)]
    queues: dict[str, Iterator[Media]] = {}
    front: list[Media] = []
    for kind, given in files.items():
        tags = [tag for tag in found if _kind(tag) == kind]
        if not tags and given and (isinstance(given, list) or list(given) == [f"<{kind}>"]):
            front += given if isinstance(given, list) else given.values()
        else:
            queues[kind] = iter(_match(kind, tags, given))
    placed = [_split(parts, queues) if turn.role == "user" else parts for turn, parts in zip(turns, own, strict=True)]
    return _in_front(turns, placed, front) if front else placed


def _match(kind: MediaKind, found: list[str], files: _Files) -> list[Media]:
    """The file of every tag in reading order; tags and files must match one to one."""
    a = A_FILE[kind]
    if isinstance(files, dict):
        known = list(files)
        if sorted(found) != sorted(known):
            missing = [tag for tag in dict.fromkeys(found) if tag not in files]
            unused = [tag for tag in known if tag not in found]
            twice = [tag for tag in known if found.count(tag) > 1]
            faults = [
                f"{truncate_middle(', '.join(tags))} {fault}"
                for tags, fault in (
                    (missing, f"in the text without {a}"),
                    (unused, f"under {kind!r} but in no user turn"),
                    (twice, "more than once in the text"),
                )
                if tags
            ]
            raise DataError(
                f"tags and {_MANY[kind]} disagree: {'; '.join(faults)}; give every {_MANY[kind][:-1]} one tag"
            )
        return [files[tag] for tag in found]
    numbered = [tag for tag in found if tag != f"<{kind}>"]
    if numbered:
        raise DataError(
            f"{truncate_middle(', '.join(numbered))} in the text, but {kind!r} names no tags; write <{kind}>, "
            f"or make {kind!r} an object from tags to paths"
        )
    if len(found) != len(files):
        raise DataError(
            f"{len(found)} <{kind}> in the user turns, {len(files)} {_MANY[kind]} under {kind!r}; "
            f"the numbers must be equal (or no <{kind}>, then the {_MANY[kind]} come first)"
        )
    return files


_MANY: dict[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audio files"}


def _in_front(turns: Sequence[Turn], placed: list[tuple[Part, ...]], files: Sequence[Media]) -> list[tuple[Part, ...]]:
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        roles = words_of(dict.fromkeys(turn.role for turn in turns))
        raise DataError(
            f"has {_MANY[files[0].kind]} but no user turn to put them in, only {roles}; add the question, or "
            "correct its role"
        )
    lead = [part for file in files for part in (file, Text("\n"))]
    placed[first] = (*lead, *placed[first])
    return placed


def _split(given: tuple[Part, ...], files: Mapping[str, Iterator[Media]]) -> tuple[Part, ...]:
    """The parts with tags in text replaced by the next files of their kinds."""
    parts: list[Part] = []
    for part in given:
        if isinstance(part, Media):
            parts.append(part)
            continue
        end = 0
        for tag in _TAG.finditer(part.text):
            parts += [Text(part.text[end : tag.start()]), next(files[_kind(tag.group())])]
            end = tag.end()
        parts.append(Text(part.text[end:]))
    return tuple(part for part in parts if not isinstance(part, Text) or part.text)
