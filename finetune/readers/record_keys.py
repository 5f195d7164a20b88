"""The keys of records: what each form reads, under every name that is in use for it.

These tables are the only place where a key is declared. A key that is in none of them is read by nothing, and
``unread`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from finetune.data_files.json_values import written
from finetune.readers.forms import Form
from finetune.sample import MEDIA_COLUMNS, MEDIA_KINDS, DataError, MediaKind, Source

IDENTITY = "id"
ANSWERS = "answers"
"""Accepted answers of an official record, read by ``evaluate``."""
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "meta_instruction")
"""Names of the system turn at the top of a record."""
TOOLS = ("tools", "functions")
"""Names of the descriptions of tools."""
LOSS = ("loss", "loss_mask", "weight", "train")
"""Names, in a turn, of whether it is trained."""
THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""Names, in an answer, of the thinking before it."""
CALLS = ("tool_calls", "function_call")
"""Names, in an answer, of the tools that it calls."""
RESULT_OF = "tool_call_id"
"""In the result of a tool, the id of the call."""
IN_TURN: Mapping[MediaKind, tuple[str, ...]] = {kind: (kind, many) for kind, many in MEDIA_COLUMNS.items()}
"""Names of the files that a user turn brings along."""
MEDIA_OF_TURNS = frozenset(name for names in IN_TURN.values() for name in names)
OBJECTS = "objects"
"""Names and boxes that take places in the text, read in every form."""
COMPARED = (
    "chosen",
    "rejected",
    "kto_tag",
    "rejected_response",
    "rejected_responses",
    "rejected_messages",
    "rejected_images",
    "non_preferred_output",
)
"""Keys of data that compare answers, which supervised finetuning has no use for."""

TURN_LISTS = ("conversations", "messages")
_VOCABULARIES = (("role", "content"), ("from", "value"))


def system_keys(form: Form) -> tuple[str, ...]:
    """The names of the system turn at the top of a record; a description names the only one."""
    if form.name == "official" or form.columns.system == SYSTEM[0]:
        return SYSTEM
    return () if form.columns.system is None else (form.columns.system,)


def tool_keys(form: Form) -> tuple[str, ...]:
    """The names of the descriptions of tools; a description names the only one."""
    if form.name == "official" or form.columns.tools == TOOLS[0]:
        return TOOLS
    return () if form.columns.tools is None else (form.columns.tools,)


@cache
def record_keys(form: Form) -> frozenset[str]:
    """Every key that is read at the top of a record."""
    columns = form.columns
    if form.name == "official":
        media = (*MEDIA_KINDS, *MEDIA_COLUMNS.values())
        return frozenset((IDENTITY, ANSWERS, OBJECTS, *TURN_LISTS, *media, *SYSTEM, *TOOLS))
    alpaca = (columns.prompt, columns.query, columns.response, columns.history)
    named = tuple(columns.media(kind) for kind in MEDIA_KINDS)
    named += alpaca if form.name == "alpaca" else (columns.messages,)
    return frozenset((IDENTITY, OBJECTS, *system_keys(form), *tool_keys(form), *filter(None, named)))


@cache
def turn_keys(form: Form) -> frozenset[str]:
    """Every key that is read in a turn."""
    names = _VOCABULARIES if form.name == "official" else ((form.tags.role_tag, form.tags.content_tag),)
    return MEDIA_OF_TURNS.union((name for pair in names for name in pair), LOSS, THOUGHT, CALLS, (RESULT_OF,))


@cache
def part_keys(kind: str) -> frozenset[str]:
    """Every key that is read in a part of this type of a content list."""
    return frozenset(("type", "text")) if kind == "text" else frozenset(("type", *file_keys(kind)))


def file_keys(kind: str) -> tuple[str, ...]:
    """The names of the file in a part that is a medium."""
    return (kind, f"{kind}_url", "path", "url")


def compared(record: Mapping[str, Any]) -> str:
    """Which keys of a record hold answers that are compared and what to do, to stand behind "has"; empty for none."""
    found = [key for key in COMPARED if record.get(key) or (key == "kto_tag" and record.get(key) is not None)]
    if found in ([], ["chosen"]):  # which alone may be the name of a column of answers
        return ""
    return (
        f"{' and '.join(map(repr, found))}, answers that are compared; only supervised finetuning is done here: keep "
        "the answer to be learnt (in 'output' or as the last turn), take the others out"
    )


def alone(given: Mapping[str, Any], names: Sequence[str], where: str, source: Source) -> tuple[str, Any] | None:
    """The key among ``names`` that an object has, and its value; None where it has none of them.

    Args:
        given: a record or a turn.
        names: of one thing.
        where: in front of the message: "", or such as "turn 3: ".
        source: named in errors.

    Raises:
        DataError: two of them, with different values.
    """
    found = [(name, given[name]) for name in names if given.get(name) is not None]
    if not found:
        return None
    first, value = found[0]
    for other, another in found[1:]:
        if another != value:
            raise DataError(
                f"{source}: {where}{first!r} is {written(value)} and {other!r} is {written(another)}, two names for "
                "one thing; keep one"
            )
    return first, value
