"""Turns of a record and its files become a Sample; shared by all forms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from finetune.quoting import words_of
from finetune.readers import lookalikes
from finetune.readers.forms import MEDIA_COLUMNS, Columns
from finetune.readers.json_values import ValueFault, parse, written
from finetune.readers.media import Places, json_cell, json_type, listed
from finetune.sample import DataError, Media, MediaKind, Message, Part, Sample, Source, Text

TrainOn = Literal["all", "last"]
TRAIN_ON: tuple[TrainOn, ...] = get_args(TrainOn)
_TAG = re.compile(r"<(image|video|audio)>")


class Slot(NamedTuple):
    """The place of the next file of a kind."""

    kind: MediaKind


class Turn(NamedTuple):
    """One turn of a record.

    Attributes:
        role: system, user, assistant or tool.
        content: text whose tags say where files go, or parts.
        loss: whether an answer may be trained.
    """

    role: str
    content: str | tuple[Part | Slot, ...]
    loss: bool = True


def assemble(turns: Sequence[tuple[str, tuple[Part, ...], bool]], source: Source, train_on: TrainOn) -> Sample:
    """The sample of some turns: role, parts, and whether an answer may be trained; all answers are, or the last."""
    answers = [index for index, (role, _, _) in enumerate(turns) if role == "assistant"]
    trained = answers if train_on == "all" else answers[-1:]
    messages = tuple(
        Message(role, parts, train=index in trained and allowed) for index, (role, parts, allowed) in enumerate(turns)
    )
    return Sample(id=source.id or str(source.index), source=source, messages=messages)


def build(
    turns: Sequence[Turn],
    record: Mapping[str, Any],
    columns: Columns,
    text_column: str,
    source: Source,
    where: Places,
    train_on: TrainOn,
) -> Sample:
    """The sample of a record with tags: each tag in a user turn takes the next file of its column.

    Where a turn has media among its parts, tags are plain text. In turns that are not the user's they always are.

    Args:
        turns: in order.
        record: has the files.
        columns: under which keys.
        text_column: where the turns came from, named in errors.
        source: named in errors.
        where: for relative paths.
        train_on: one of TRAIN_ON.

    Raises:
        DataError: a file is missing, or there are not as many tags as files.
    """
    files: dict[MediaKind, list[Media]] = {}
    for kind in MEDIA_COLUMNS:
        column = columns.media(kind)
        files[kind] = [] if column is None else listed(record.get(column), kind, column, source, where)
    turns, files = lookalikes.settle(turns, files, source, where, _TAG)
    explicit = any(
        not isinstance(part, Text) for turn in turns if not isinstance(turn.content, str) for part in turn.content
    )
    slotted = [_slots(turn, explicit) for turn in turns]
    for kind, found in files.items():
        _check_counts(kind, slotted, turns, found, columns, text_column, source, explicit)
    queues: dict[MediaKind, Iterator[Media]] = {kind: iter(found) for kind, found in files.items()}
    filled = [tuple(_filled(parts, queues)) for parts in slotted]
    return assemble(
        [(turn.role, parts, turn.loss) for turn, parts in zip(turns, filled, strict=True)], source, train_on
    )


def _slots(turn: Turn, explicit: bool) -> tuple[Part | Slot, ...]:
    parts = (Text(turn.content),) if isinstance(turn.content, str) else turn.content
    if turn.role != "user" or explicit:
        return tuple(parts)
    return tuple(piece for part in parts for piece in (_split(part.text) if isinstance(part, Text) else [part]))


def _split(text: str) -> Iterator[Part | Slot]:
    """Text with its tags replaced by slots; empty text is left out."""
    pieces = _TAG.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            yield Slot(piece)  # pyright: ignore[reportArgumentType]
        elif piece:
            yield Text(piece)


def _filled(parts: Sequence[Part | Slot], queues: Mapping[MediaKind, Iterator[Media]]) -> Iterator[Part]:
    for part in parts:
        yield next(queues[part.kind]) if isinstance(part, Slot) else part


def _check_counts(
    kind: MediaKind,
    slotted: Sequence[tuple[Part | Slot, ...]],
    turns: Sequence[Turn],
    files: Sequence[Media],
    columns: Columns,
    text_column: str,
    source: Source,
    explicit: bool,
) -> None:
    """There are as many places for a kind of files as files."""
    count = sum(isinstance(part, Slot) and part.kind == kind for parts in slotted for part in parts)
    if count == len(files):
        return
    column = columns.media(kind)
    tag = f'parts of type "{kind}" without a path' if explicit else f"<{kind}>"
    under = f"{len(files)} files under {column!r}" if column else f"no column for {MEDIA_COLUMNS[kind]} is named"
    elsewhere = sum(str(turn.content).count(f"<{kind}>") for turn in turns if turn.role != "user")
    note = f" ({elsewhere} more in other turns, where they are plain text)" if elsewhere and not explicit else ""
    fix = "give every file one place" if column else f"name the column of the files, {MEDIA_COLUMNS[kind]!r}"
    raise DataError(
        f"{source}: {count} {tag} in the user turns of {text_column!r}{note}, {under}; they must be as many: {fix}"
    )


def loss(turn: Mapping[str, Any], role: str, number: int, source: Source) -> bool:
    """Whether the turn may be trained: its ``loss``, 1 where it has none.

    Raises:
        DataError: neither 0 nor 1, or 1 in a turn that is no answer.
    """
    given = turn.get("loss")
    if given is None:
        return True
    if not isinstance(given, int) or given not in (0, 1):
        raise DataError(
            f"{source}: turn {number}: 'loss' is {written(given)}; it must be 1 (train the answer) or 0 (do not)"
        )
    if given and role != "assistant":
        raise DataError(
            f"{source}: turn {number}: 'loss' is 1 in a {role} turn; only answers are trained, remove it there"
        )
    return bool(given)


def turn_list(record: Mapping[str, Any], column: str | None, source: Source) -> list[Mapping[str, Any]]:
    """The turns of a record as objects.

    Raises:
        DataError: the column is missing, or is not a list of objects.
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
    return list(turns)


def system_text(record: Mapping[str, Any], column: str | None, source: Source) -> str:
    """The system prompt of a record's own column, empty where it has none.

    Raises:
        DataError: it is not a string.
    """
    given = None if column is None else record.get(column)
    if given is None:
        return ""
    if not isinstance(given, str):
        raise DataError(f"{source}: {column!r} is {json_type(given)}; the system prompt must be a string")
    return given


def refuse_tools(record: Mapping[str, Any], column: str | None, source: Source) -> None:
    """Descriptions of tools are refused: how a prompt words them differs from model to model.

    Raises:
        DataError: the record has some.
    """
    given = None if column is None else record.get(column)
    if isinstance(given, str):
        given = given.strip() not in ("", "[]", "{}", "null")
    if given:
        raise DataError(
            f"{source}: {column!r} describes tools, and samples have no place for that: every model words it in its "
            "own way; write the description as your model's chat template does into the system turn and leave "
            f"{column!r} empty"
        )


def check_call(text: str, number: int, source: Source) -> None:
    """A tool call must be text as the model writes it: JSON alone would be learnt as the answer.

    Raises:
        DataError: it is JSON.
    """
    try:
        parse(text)
    except json.JSONDecodeError:
        return
    except ValueFault:
        pass  # it is JSON, of a kind
    raise DataError(
        f"{source}: turn {number} calls a tool in JSON ({text[:40]!r}); how a call is written differs from model to "
        "model: write it as your model's chat template does (<tool_call>...</tool_call>)"
    )
