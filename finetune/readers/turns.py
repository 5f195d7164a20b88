"""``Turn``: a turn of a record with its text, loss flag, thinking, tool calls and own media; shared by all formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune.data_files.json_values import json_cell, json_type, written
from finetune.readers import record_keys, tool_calls
from finetune.readers.record_media import MediaFolders, read_media
from finetune.sample import Call, DataError, Media, MediaKind, Part
from finetune.utils.quoting import words_of

_NO_FILES: Mapping[MediaKind, tuple[Media, ...]] = {}


class MediaPlaceholder(NamedTuple):
    """Placeholder of the next file of a kind."""

    kind: MediaKind


class Turn(NamedTuple):
    """One turn of a record.

    Attributes:
        role: system, user, assistant, tool, or function for an answer that consists of tool calls.
        content: text with media tags, or parts.
        loss: whether an answer may be trained.
        thought: thinking of an answer under its own key.
        files: media files of the turn itself, by kind.
        calls: tool calls.
    """

    role: str
    content: str | tuple[Part | MediaPlaceholder, ...]
    loss: bool = True
    thought: str = ""
    files: Mapping[MediaKind, tuple[Media, ...]] = _NO_FILES
    calls: tuple[Call, ...] = ()


def turn_list(record: Mapping[str, Any], column: str | None) -> list[Mapping[str, Any]]:
    """The turns of a record as objects.

    Raises:
        DataError: the column is missing or not a list of objects, or tool results are not in order.
    """
    if column is None:
        raise DataError("no column is named for the turns; name it under columns: messages")
    turns = json_cell(record.get(column))
    if turns is None:
        raise DataError(f"has no {column!r} (found {words_of(record)}); add the list of turns, or name its column")
    if not isinstance(turns, (list, tuple)):
        raise DataError(f"{column!r} is {json_type(turns)}; it must be a list of turns")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"turn {number} is {json_type(turn)}; it must be an object with role and content")
    tool_calls.check_result_order(turns)
    return list(turns)


def text_of(turn: Mapping[str, Any], key: str, number: int, wanted: str = "a string") -> str:
    """The text of a turn; only a turn with tool calls may have none.

    Raises:
        DataError: it is missing, or not a string.
    """
    content = turn.get(key)
    if content is None and any(turn.get(name) for name in record_keys.CALLS):
        return ""
    if not isinstance(content, str):
        raise DataError(f"turn {number}: {state(turn, key)}; it must be {wanted}")
    return content


def state(turn: Mapping[str, Any], key: str) -> str:
    """A description of the value that is not a string, for errors."""
    if turn.get(key) is not None:
        return f"{key!r} is {json_type(turn[key])}"
    return f"{key!r} is null" if key in turn else f"{key!r} is missing (found {words_of(turn)})"


def complete(
    given: Mapping[str, Any],
    role: str,
    content: str | tuple[Part | MediaPlaceholder, ...],
    number: int,
    where: MediaFolders,
) -> Turn:
    """The turn with role, content and the values of its other keys.

    Raises:
        DataError: an invalid value, or one that is not allowed for this role.
    """
    if len(given) == 2 and content and role != "function":
        return Turn(role, content)  # no other keys, as in most records
    answers = "assistant" if role == "function" else role
    calls = tool_calls.read_calls(given, role, number)
    if calls and isinstance(content, str):
        tool_calls.check_no_call_in_text(content, number)
    elif role == "function" and isinstance(content, str):
        content, calls = tool_calls.split_calls(content, number)
    return Turn(
        role,
        content,
        _loss(given, answers, number),
        _thought(given, answers, number),
        _files(given, answers, number, where),
        calls,
    )


def _loss(given: Mapping[str, Any], role: str, number: int) -> bool:
    """Whether the turn may be trained; the default is 1."""
    found = record_keys.alone(given, record_keys.LOSS, f"turn {number}: ")
    if found is None:
        return True
    name, value = found
    if not isinstance(value, (int, float)) or value not in (0, 1):
        part = isinstance(value, float) and 0 < value < 1
        why = "; answers are trained in full or not at all" if part else ""
        raise DataError(
            f"turn {number}: {name!r} is {written(value)}; it must be 1 (train the answer) or 0 (do not){why}"
        )
    if value and role != "assistant":
        raise DataError(f"turn {number}: {name!r} is 1 in a {role} turn; only answers are trained, remove it there")
    return bool(value)


def _thought(given: Mapping[str, Any], role: str, number: int) -> str:
    """The thinking of a turn under its own key, empty if it has none."""
    found = record_keys.alone(given, record_keys.THOUGHT, f"turn {number}: ")
    if found is None:
        return ""
    name, value = found
    if not isinstance(value, str):
        raise DataError(f"turn {number}: {name!r} is {json_type(value)}; thinking must be a string")
    if value.strip() and role != "assistant":
        raise DataError(f"turn {number}: {name!r} in a {role} turn; only answers have thinking; remove or move it")
    return value


def _files(
    given: Mapping[str, Any], role: str, number: int, where: MediaFolders
) -> Mapping[MediaKind, tuple[Media, ...]]:
    """The media files of the turn itself, by kind."""
    if record_keys.MEDIA_OF_TURNS.isdisjoint(given):
        return _NO_FILES
    files: dict[MediaKind, tuple[Media, ...]] = {}
    for kind, names in record_keys.IN_TURN.items():
        found = record_keys.alone(given, names, f"turn {number}: ")
        if found is None or not found[1]:
            continue
        name, value = found
        if role != "user":
            raise DataError(f"turn {number}: {name!r} in a {role} turn; media belong into user turns")
        files[kind] = tuple(read_media(value, kind, f"turn {number}, {name}", where))
    return files
