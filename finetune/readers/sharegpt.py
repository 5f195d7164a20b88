"""Records of the sharegpt form: turns under one key, files under others, their places as tags in the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.quoting import shown, words_of
from finetune.readers.conversation import TrainOn, Turn, build, check_call, loss, refuse_tools, system_text, turn_list
from finetune.readers.forms import Form, Tags
from finetune.readers.media import Places, json_type
from finetune.sample import DataError, Sample, Source


def sample(record: Mapping[str, Any], source: Source, where: Places, train_on: TrainOn, form: Form) -> Sample:
    """The sample of a record.

    Raises:
        DataError: the record is not of the form, its tags and files differ in number, or a file is missing.
    """
    columns = form.columns
    refuse_tools(record, columns.tools, source)
    turns = [
        _turn(turn, number, form.tags, source)
        for number, turn in enumerate(turn_list(record, columns.messages, source))
    ]
    system = system_text(record, columns.system, source)
    if system and not (turns and turns[0].role == "system"):
        turns.insert(0, Turn("system", system))
    if turns and turns[0].role == "system" and not turns[0].content:
        del turns[0]  # an empty prompt is none: the model's own holds
    assert columns.messages is not None
    return build(turns, record, columns, columns.messages, source, where, train_on)


def _turn(turn: Mapping[str, Any], number: int, tags: Tags, source: Source) -> Turn:
    role = role_of(turn, number, tags, source)
    content = turn.get(tags.content_tag)
    if not isinstance(content, str):
        raise DataError(f"{source}: turn {number}: {state(turn, tags.content_tag)}; it must be a string")
    if role == "function":
        check_call(content, number, source)
        role = "assistant"
    return Turn(role, content, loss(turn, role, number, source))


def role_of(turn: Mapping[str, Any], number: int, tags: Tags, source: Source) -> str:
    """What the word for the role of a turn means: a role, or "function".

    Raises:
        DataError: it is missing or unknown.
    """
    word = turn.get(tags.role_tag)
    if not isinstance(word, str):
        raise DataError(f"{source}: turn {number}: {state(turn, tags.role_tag)}; it must be a string")
    roles = tags.roles
    if word not in roles:
        known = ", ".join(roles)
        raise DataError(
            f"{source}: turn {number}: {tags.role_tag!r} is {shown(word, 60)}, an unknown tag; known are {known} "
            "(dataset_info.json names others under tags)"
        )
    return roles[word]


def state(turn: Mapping[str, Any], key: str) -> str:
    """What a turn has instead of a string."""
    if turn.get(key) is not None:
        return f"{key!r} is {json_type(turn[key])}"
    return f"{key!r} is null" if key in turn else f"{key!r} is missing (found {words_of(turn)})"
