"""What a turn of a record says beside its text, in every form: loss, thinking, calls of tools, files of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune.data_files.json_values import written
from finetune.readers import record_keys, tool_calls
from finetune.readers.record_media import Places, json_cell, json_type, listed
from finetune.sample import Call, DataError, Media, MediaKind, Part, Source
from finetune.utils.quoting import words_of

_NO_FILES: Mapping[MediaKind, tuple[Media, ...]] = {}


class Slot(NamedTuple):
    """The place of the next file of a kind."""

    kind: MediaKind


class Turn(NamedTuple):
    """One turn of a record.

    Attributes:
        role: system, user, assistant, tool, or function for an answer whose text is its calls.
        content: text whose tags say where files go, or parts.
        loss: whether an answer may be trained.
        thought: the thinking of an answer, where the record has it apart from the text.
        files: those that the turn itself names, by kind.
        calls: of tools.
    """

    role: str
    content: str | tuple[Part | Slot, ...]
    loss: bool = True
    thought: str = ""
    files: Mapping[MediaKind, tuple[Media, ...]] = _NO_FILES
    calls: tuple[Call, ...] = ()


def turn_list(record: Mapping[str, Any], column: str | None, source: Source) -> list[Mapping[str, Any]]:
    """The turns of a record as objects.

    Raises:
        DataError: the column is missing, or is not a list of objects; or results of tools are in disorder.
    """
    if column is None:
        raise DataError(f"{source}: no column is named for the turns; name it under columns: messages")
    turns = json_cell(record.get(column))
    if turns is None:
        raise DataError(
            f"{source}: has no {column!r} (found {words_of(record)}); add the list of turns, or name its column"
        )
    if not isinstance(turns, (list, tuple)):
        raise DataError(f"{source}: {column!r} is {json_type(turns)}; it must be a list of turns")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{source}: turn {number} is {json_type(turn)}; it must be an object with role and content")
    tool_calls.check_order(turns, source)
    return list(turns)


def text_of(turn: Mapping[str, Any], key: str, number: int, source: Source, wanted: str = "a string") -> str:
    """The text of a turn, which only one that calls tools may lack.

    Raises:
        DataError: it is missing, or no string.
    """
    content = turn.get(key)
    if content is None and any(turn.get(name) for name in record_keys.CALLS):
        return ""
    if not isinstance(content, str):
        raise DataError(f"{source}: turn {number}: {state(turn, key)}; it must be {wanted}")
    return content


def state(turn: Mapping[str, Any], key: str) -> str:
    """What a turn has instead of a string."""
    if turn.get(key) is not None:
        return f"{key!r} is {json_type(turn[key])}"
    return f"{key!r} is null" if key in turn else f"{key!r} is missing (found {words_of(turn)})"


def complete(
    given: Mapping[str, Any],
    role: str,
    content: str | tuple[Part | Slot, ...],
    number: int,
    source: Source,
    where: Places,
) -> Turn:
    """The turn whose role and content have been read, with all that its other keys say.

    Raises:
        DataError: a key has a value that it cannot have, or cannot have in a turn of this role.
    """
    if len(given) == 2 and content and role != "function":
        return Turn(role, content)  # these are all it has, as in most records
    answers = "assistant" if role == "function" else role
    calls = tool_calls.called(given, role, number, source)
    if calls and isinstance(content, str):
        tool_calls.check_once(content, number, source)
    elif role == "function" and isinstance(content, str):
        content, calls = tool_calls.spoken(content, number, source)
    return Turn(
        role,
        content,
        _loss(given, answers, number, source),
        _thought(given, answers, number, source),
        _files(given, answers, number, source, where),
        calls,
    )


def _loss(given: Mapping[str, Any], role: str, number: int, source: Source) -> bool:
    """Whether the turn may be trained: what it says of that, 1 where it says nothing."""
    found = record_keys.alone(given, record_keys.LOSS, f"turn {number}: ", source)
    if found is None:
        return True
    name, value = found
    if not isinstance(value, (int, float)) or value not in (0, 1):
        part = isinstance(value, float) and 0 < value < 1
        why = "; answers are trained in full or not at all" if part else ""
        raise DataError(
            f"{source}: turn {number}: {name!r} is {written(value)}; it must be 1 (train the answer) or 0 (do not){why}"
        )
    if value and role != "assistant":
        raise DataError(
            f"{source}: turn {number}: {name!r} is 1 in a {role} turn; only answers are trained, remove it there"
        )
    return bool(value)


def _thought(given: Mapping[str, Any], role: str, number: int, source: Source) -> str:
    """The thinking that a turn has under a key of its own, empty where it has none."""
    found = record_keys.alone(given, record_keys.THOUGHT, f"turn {number}: ", source)
    if found is None:
        return ""
    name, value = found
    if not isinstance(value, str):
        raise DataError(f"{source}: turn {number}: {name!r} is {json_type(value)}; thinking must be a string")
    if value.strip() and role != "assistant":
        raise DataError(
            f"{source}: turn {number}: {name!r} in a {role} turn; only answers think, remove it or move it there"
        )
    return value


def _files(
    given: Mapping[str, Any], role: str, number: int, source: Source, where: Places
) -> Mapping[MediaKind, tuple[Media, ...]]:
    """The files that a turn names itself, by kind."""
    if record_keys.MEDIA_OF_TURNS.isdisjoint(given):
        return _NO_FILES
    files: dict[MediaKind, tuple[Media, ...]] = {}
    for kind, names in record_keys.IN_TURN.items():
        found = record_keys.alone(given, names, f"turn {number}: ", source)
        if found is None or not found[1]:
            continue
        name, value = found
        if role != "user":
            raise DataError(f"{source}: turn {number}: {name!r} in a {role} turn; media belong into user turns")
        files[kind] = tuple(listed(value, kind, f"turn {number}, {name}", source, where))
    return files
