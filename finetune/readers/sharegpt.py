"""Records of the sharegpt form: turns under one key, files under others, their places as tags in the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.readers.conversation import TrainOn, build
from finetune.readers.forms import Form, Tags
from finetune.readers.record_media import Places
from finetune.readers.turns import Turn, complete, state, text_of, turn_list
from finetune.sample import DataError, Sample, Source
from finetune.utils.quoting import shown


def sample(record: Mapping[str, Any], source: Source, where: Places, train_on: TrainOn, form: Form) -> Sample:
    """The sample of a record.

    Raises:
        DataError: the record is not of the form, its tags and files differ in number, or a file is missing.
    """
    turns = [
        _turn(turn, number, form.tags, source, where)
        for number, turn in enumerate(turn_list(record, form.columns.messages, source))
    ]
    return build(turns, record, form, source, where, train_on)


def _turn(turn: Mapping[str, Any], number: int, tags: Tags, source: Source, where: Places) -> Turn:
    role = role_of(turn, number, tags, source)
    return complete(turn, role, text_of(turn, tags.content_tag, number, source), number, source, where)


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
