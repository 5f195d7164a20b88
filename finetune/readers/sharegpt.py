"""ShareGPT format: turns under one key, media files in columns, placeholders as tags in the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.readers.conversation import Conversation, TrainOn, build
from finetune.readers.forms import Form, Tags
from finetune.readers.record_media import MediaFolders
from finetune.readers.turns import Turn, complete, state, text_of, turn_list
from finetune.sample import DataError
from finetune.utils.quoting import shown


def conversation(record: Mapping[str, Any], where: MediaFolders, train_on: TrainOn, form: Form) -> Conversation:
    """The conversation of a record.

    Raises:
        DataError: the record is not in this format, numbers of tags and files differ, or a file is missing.
    """
    turns = [
        _turn(turn, number, form.tags, where) for number, turn in enumerate(turn_list(record, form.columns.messages))
    ]
    return build(turns, record, form, where, train_on)


def _turn(turn: Mapping[str, Any], number: int, tags: Tags, where: MediaFolders) -> Turn:
    role = role_of(turn, number, tags)
    return complete(turn, role, text_of(turn, tags.content_tag, number), number, where)


def role_of(turn: Mapping[str, Any], number: int, tags: Tags) -> str:
    """The role of a turn by its role name: a role, or "function".

    Raises:
        DataError: it is missing or unknown.
    """
    name = turn.get(tags.role_tag)
    if not isinstance(name, str):
        raise DataError(f"turn {number}: {state(turn, tags.role_tag)}; it must be a string")
    roles = tags.roles
    if name not in roles:
        known = ", ".join(roles)
        raise DataError(
            f"turn {number}: {tags.role_tag!r} is {shown(name, 60)}, an unknown role; known are {known} "
            "(others can be declared under tags in dataset_info.json)"
        )
    return roles[name]
