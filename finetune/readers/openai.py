"""OpenAI format: chat messages whose content is text, or a list of text and media parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data_files.json_values import json_type
from finetune.readers import record_keys
from finetune.readers.conversation import Conversation, TrainOn, build
from finetune.readers.forms import Form, Tags
from finetune.readers.record_media import MediaFolders, read_medium
from finetune.readers.sharegpt import role_of
from finetune.readers.turns import MediaPlaceholder, Turn, complete, text_of, turn_list
from finetune.sample import MEDIA_COLUMNS, DataError, Media, MediaKind, Part, Text
from finetune.utils.quoting import shown


def conversation(record: Mapping[str, Any], where: MediaFolders, train_on: TrainOn, form: Form) -> Conversation:
    """The conversation of a record; media are content parts, or tags with the files in a column.

    Raises:
        DataError: the record is not in this format, numbers of placeholders and files differ, or a file is missing.
    """
    turns = [
        _turn(turn, number, form.tags, where) for number, turn in enumerate(turn_list(record, form.columns.messages))
    ]
    return build(turns, record, form, where, train_on)


def _turn(turn: Mapping[str, Any], number: int, tags: Tags, where: MediaFolders) -> Turn:
    role = role_of(turn, number, tags)
    content = turn.get(tags.content_tag)
    if isinstance(content, (list, tuple)):
        if not content:
            raise DataError(f"turn {number}: {tags.content_tag!r} is an empty list; give its parts, or text")
        parts = tuple(_part(part, number, where) for part in content)
    else:
        parts = text_of(turn, tags.content_tag, number, "text or a list of parts")
    return complete(turn, role, parts, number, where)


def _part(part: Any, number: int, where: MediaFolders) -> Part | MediaPlaceholder:
    """One part of a content list; Parquet fills the keys of other parts with null."""
    if not isinstance(part, dict):
        raise DataError(f"turn {number} has {json_type(part)} among its parts; parts are objects with 'type'")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f"turn {number}: a part of type 'text' without 'text', a string")
        return Text(part["text"])
    medium = str(kind).removesuffix("_url")
    if medium not in MEDIA_COLUMNS:
        raise DataError(
            f"turn {number} has a part of type {shown(kind, 60)}; known are text, image_url, image, video and audio"
        )
    return _medium(part, medium, number, where)  # pyright: ignore[reportArgumentType]


def _medium(part: Mapping[str, Any], kind: MediaKind, number: int, where: MediaFolders) -> Media | MediaPlaceholder:
    found = record_keys.alone(part, record_keys.file_keys(kind), f"turn {number}, a part of type {kind!r}: ")
    if found is None:
        return MediaPlaceholder(kind)
    given = found[1]
    if isinstance(given, dict) and "url" in given:
        given = given["url"]
    return read_medium(given, kind, f"messages, turn {number}", where)
