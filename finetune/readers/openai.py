"""Records of the openai form: chat messages whose content is text, or a list of text and media parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.quoting import shown
from finetune.readers.conversation import (
    Slot,
    TrainOn,
    Turn,
    build,
    check_call,
    loss,
    refuse_tools,
    system_text,
    turn_list,
)
from finetune.readers.forms import MEDIA_COLUMNS, Form, Tags
from finetune.readers.media import Places, json_type, one
from finetune.readers.sharegpt import role_of, state
from finetune.sample import DataError, Media, MediaKind, Part, Sample, Source, Text


def sample(record: Mapping[str, Any], source: Source, where: Places, train_on: TrainOn, form: Form) -> Sample:
    """The sample of a record; media stand among the parts, or at tags with their files in a column.

    Raises:
        DataError: the record is not of the form, places and files differ in number, or a file is missing.
    """
    columns = form.columns
    refuse_tools(record, columns.tools, source)
    turns = [
        _turn(turn, number, form.tags, source, where)
        for number, turn in enumerate(turn_list(record, columns.messages, source))
    ]
    system = system_text(record, columns.system, source)
    if system and not (turns and turns[0].role == "system"):
        turns.insert(0, Turn("system", system))
    if turns and turns[0].role == "system" and not turns[0].content:
        del turns[0]  # an empty prompt is none: the model's own holds
    assert columns.messages is not None
    return build(turns, record, columns, columns.messages, source, where, train_on)


def _turn(turn: Mapping[str, Any], number: int, tags: Tags, source: Source, where: Places) -> Turn:
    role = role_of(turn, number, tags, source)
    if turn.get("tool_calls"):
        raise DataError(
            f"{source}: turn {number} has 'tool_calls'; how a call is written differs from model to model: write it "
            "into the content as your model's chat template does (<tool_call>...</tool_call>)"
        )
    content = turn.get(tags.content_tag)
    if isinstance(content, (list, tuple)):
        if not content:
            raise DataError(f"{source}: turn {number}: {tags.content_tag!r} is an empty list; give its parts, or text")
        parts = tuple(_part(part, number, source, where) for part in content)
    elif isinstance(content, str):
        parts = content
    else:
        raise DataError(f"{source}: turn {number}: {state(turn, tags.content_tag)}; it must be text or a list of parts")
    if role == "function":
        role = "assistant"
        if isinstance(parts, str):
            check_call(parts, number, source)
    return Turn(role, parts, loss(turn, role, number, source))


def _part(part: Any, number: int, source: Source, where: Places) -> Part | Slot:
    """One part of a content list; Parquet fills the keys of other parts with null."""
    if not isinstance(part, dict):
        raise DataError(f"{source}: turn {number} has {json_type(part)} among its parts; parts are objects with 'type'")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f"{source}: turn {number}: a part of type 'text' without 'text', a string")
        return Text(part["text"])
    medium = str(kind).removesuffix("_url")
    if medium not in MEDIA_COLUMNS:
        raise DataError(
            f"{source}: turn {number} has a part of type {shown(kind, 60)}; known are text, image_url, image, video "
            "and audio"
        )
    return _medium(part, medium, number, source, where)  # pyright: ignore[reportArgumentType]


def _medium(part: Mapping[str, Any], kind: MediaKind, number: int, source: Source, where: Places) -> Media | Slot:
    keys = (kind, f"{kind}_url", "path", "url")
    given = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(given, dict) and "url" in given:
        given = given["url"]
    if given is None:
        return Slot(kind)
    return one(given, kind, f"messages, turn {number}", source, where)
