"""Builds a ``Conversation`` (messages, media, tools) from the turns and media files of a record, of any format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from finetune.data_files.json_values import json_type, written
from finetune.readers import foreign_placeholders, record_keys, tool_calls
from finetune.readers.forms import Form
from finetune.readers.record_media import MediaFolders, read_media
from finetune.readers.turns import MediaPlaceholder, Turn
from finetune.sample import MEDIA_COLUMNS, DataError, Media, MediaKind, Message, Part, Text, Tool

TrainOn = Literal["all", "last"]
TRAIN_ON: tuple[TrainOn, ...] = get_args(TrainOn)
_TAG = re.compile(r"<(image|video|audio)>")


class Conversation(NamedTuple):
    """What a record says: a ``Sample`` without id and source.

    Attributes:
        messages: its turns.
        tools: descriptions of the tools that may be called.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]


def assemble(
    turns: Sequence[Turn], parts: Sequence[tuple[Part, ...]], tools: tuple[Tool, ...], train_on: TrainOn
) -> Conversation:
    """The conversation of turns with their parts; all answers are trained, or the last one."""
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    trained = answers if train_on == "all" else answers[-1:]
    messages = tuple(
        Message(turn.role, own, index in trained and turn.loss, turn.thought, turn.calls)
        for index, (turn, own) in enumerate(zip(turns, parts, strict=True))
    )
    return Conversation(messages, tools)


def build(
    turns: Sequence[Turn], record: Mapping[str, Any], form: Form, where: MediaFolders, train_on: TrainOn
) -> Conversation:
    """The conversation of a record with tags: each tag in a user turn is replaced by the next file of its column.

    Files in a turn itself replace the tags of that turn, or precede its text. If a turn has media parts, tags are plain
    text; outside of user turns they always are.

    Args:
        turns: turns of the record, in order.
        record: the record, with the media columns.
        form: format of the record.
        where: base folders of relative paths.
        train_on: one of TRAIN_ON.

    Raises:
        DataError: a file is missing, or the numbers of tags and files differ.
    """
    files: dict[MediaKind, list[Media]] = {}
    for kind in MEDIA_COLUMNS:
        column = form.columns.media(kind)
        files[kind] = [] if column is None else read_media(record.get(column), kind, column, where)
    turns = with_system(joined(turns), record, record_keys.system_keys(form))
    if turns and turns[0].role == "system" and not turns[0].content:
        del turns[0]  # an empty system prompt counts as none: the model's default is used
    turns, files = foreign_placeholders.to_tags(turns, files, where, _TAG)
    explicit = any(
        not isinstance(part, Text) for turn in turns if not isinstance(turn.content, str) for part in turn.content
    )
    slotted = [
        _slots(turn.role, own_placed(turn, number, tags=not explicit), explicit) for number, turn in enumerate(turns)
    ]
    for kind, found in files.items():
        _check_counts(kind, slotted, turns, found, form, explicit)
    queues: dict[MediaKind, Iterator[Media]] = {kind: iter(found) for kind, found in files.items()}
    filled = [tuple(_filled(parts, queues)) for parts in slotted]
    return assemble(turns, filled, tool_calls.read_tools(record, record_keys.tool_keys(form)), train_on)


def joined(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, with turns that only call tools merged into the preceding answer."""
    result: list[Turn] = []
    for turn in turns:
        before = result[-1] if result else None
        if turn.role == "function":
            turn = turn._replace(role="assistant")
            if before and before.role == "assistant" and turn[1:4] == ("", before.loss, ""):
                result[-1] = before._replace(calls=(*before.calls, *turn.calls))
                continue
        result.append(turn)
    return result


def own_placed(turn: Turn, number: int, *, tags: bool = True) -> tuple[Part | MediaPlaceholder, ...]:
    """The content of a turn with its own files at its tags, or before its text if it has no tags.

    Args:
        turn: the turn; tags of kinds without own files are not changed.
        number: number of the turn, for errors.
        tags: whether tags are placeholders.

    Raises:
        DataError: the numbers of tags and files differ.
    """
    parts: tuple[Part | MediaPlaceholder, ...] = (
        (Text(turn.content),) if isinstance(turn.content, str) else turn.content
    )
    front: list[Part] = []
    for kind, files in turn.files.items():
        tag = f"<{kind}>"
        count = sum(part.text.count(tag) for part in parts if isinstance(part, Text)) if tags else 0
        if count not in (0, len(files)):
            raise DataError(
                f"turn {number} has {count} {tag} in its text and names {len(files)} files of that kind; "
                "the numbers must be equal (or no tag, then the files come first)"
            )
        if not count:
            front += [part for file in files for part in (file, Text("\n"))]
            continue
        left = iter(files)
        parts = tuple(
            each for part in parts for each in (_at_tags(part, tag, left) if isinstance(part, Text) else (part,))
        )
    return (*front, *parts)


def _at_tags(part: Text, tag: str, files: Iterator[Media]) -> Iterator[Part]:
    first, *rest = part.text.split(tag)
    if first:
        yield Text(first)
    for text in rest:
        yield next(files)
        if text:
            yield Text(text)


def _slots(
    role: str, parts: tuple[Part | MediaPlaceholder, ...], explicit: bool
) -> tuple[Part | MediaPlaceholder, ...]:
    if role != "user" or explicit:
        return parts
    return tuple(each for part in parts for each in (_split(part.text) if isinstance(part, Text) else [part]))


def _split(text: str) -> Iterator[Part | MediaPlaceholder]:
    """Text with its tags replaced by slots; empty text is dropped."""
    for number, part in enumerate(_TAG.split(text)):
        if number % 2:
            yield MediaPlaceholder(part)  # pyright: ignore[reportArgumentType]
        elif part:
            yield Text(part)


def _filled(parts: Sequence[Part | MediaPlaceholder], queues: Mapping[MediaKind, Iterator[Media]]) -> Iterator[Part]:
    for part in parts:
        yield next(queues[part.kind]) if isinstance(part, MediaPlaceholder) else part


def _check_counts(
    kind: MediaKind,
    slotted: Sequence[tuple[Part | MediaPlaceholder, ...]],
    turns: Sequence[Turn],
    files: Sequence[Media],
    form: Form,
    explicit: bool,
) -> None:
    """Checks that the numbers of placeholders and files of a kind are equal."""
    count = sum(isinstance(part, MediaPlaceholder) and part.kind == kind for parts in slotted for part in parts)
    if count == len(files):
        return
    columns = form.columns
    text_column = columns.messages if form.name != "alpaca" else columns.prompt or columns.query
    column = columns.media(kind)
    tag = f'parts of type "{kind}" without a path' if explicit else f"<{kind}>"
    under = f"{len(files)} files under {column!r}" if column else f"no column for {MEDIA_COLUMNS[kind]} is named"
    elsewhere = sum(str(turn.content).count(f"<{kind}>") for turn in turns if turn.role != "user")
    note = f" ({elsewhere} more in other turns, where they are plain text)" if elsewhere and not explicit else ""
    fix = "give every file one place" if column else f"name the column of the files, {MEDIA_COLUMNS[kind]!r}"
    raise DataError(
        f"{count} {tag} in the user turns of {text_column!r}{note}, {under}; the numbers must be equal: {fix}"
    )


def with_system(turns: list[Turn], record: Mapping[str, Any], names: Sequence[str]) -> list[Turn]:
    """The turns after the system prompt of the record's own key, if any.

    Args:
        turns: turns of the record.
        record: the record.
        names: keys of the system prompt.

    Raises:
        DataError: it is not a string, or the record has two different ones.
    """
    name, given = record_keys.alone(record, names, "") or ("", "")
    if not isinstance(given, str):
        raise DataError(f"{name!r} is {json_type(given)}; the system prompt must be a string")
    if not turns or turns[0].role != "system":
        return [Turn("system", given), *turns] if given else turns
    own = turns[0].content
    if not own:
        return [Turn("system", given), *turns[1:]] if given else turns
    if given and own not in (given, (Text(given),)):
        shown = written(own) if isinstance(own, str) else "another one"
        raise DataError(f"{name!r} is {written(given)} and the system turn is {shown}; keep one")
    return turns
