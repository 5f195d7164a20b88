"""Tables of the keys that each format reads, with their synonyms.

A key that is in no table is not read, and ``unread_keys`` reports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from finetune.data_files.json_values import written
from finetune.readers.forms import Form
from finetune.sample import MEDIA_COLUMNS, MEDIA_KINDS, DataError, MediaKind

IDENTITY = "id"
ANSWERS = "answers"
"""Accepted answers of an official record, read by ``evaluate``."""
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "meta_instruction")
"""Keys of the system prompt at the top level of a record."""
TOOLS = ("tools", "functions")
"""Keys of the tool descriptions."""
LOSS = ("loss", "loss_mask", "weight", "train")
"""Keys of a turn for whether it is trained."""
THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""Keys of an answer for its thinking."""
CALLS = ("tool_calls", "function_call")
"""Keys of an answer for its tool calls."""
RESULT_OF = "tool_call_id"
"""Key of a tool result for the id of its call."""
IN_TURN: Mapping[MediaKind, tuple[str, ...]] = {kind: (kind, many) for kind, many in MEDIA_COLUMNS.items()}
"""Keys of a user turn for its own media files."""
MEDIA_OF_TURNS = frozenset(name for names in IN_TURN.values() for name in names)
DUPLEX = "duplex"
"""Key that makes a record a full-duplex one."""
SDK_KEYS = ("data_id", "system", "unit_policy", "tracks")
"""Keys of a record of minicpm-o5-sdk."""
OBJECTS = "objects"
"""Key of the grounding names and boxes, read in every format."""
UNPAIRED = ("kto_tag", "rejected_responses", "rejected_images", "non_preferred_output")
"""Keys of preference data that no stage reads."""
COMPARED = ("chosen", "rejected", "rejected_response", "rejected_messages", *UNPAIRED)
"""Keys of preference data, which ``--stage dpo`` reads (``answer_pairs``)."""

TURN_LISTS = ("conversations", "messages")
_VOCABULARIES = (("role", "content"), ("from", "value"))


def is_timeline(record: Mapping[str, Any]) -> bool:
    """Whether a record is a full-duplex one."""
    return record.get(DUPLEX) is not None or is_of_sdk(record)


def is_of_sdk(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of minicpm-o5-sdk."""
    return "unit_policy" in record and isinstance(record.get("tracks"), (dict, str))


def system_keys(form: Form) -> tuple[str, ...]:
    """The keys of the system prompt; a column in dataset_info.json replaces them."""
    if form.name == "official" or form.columns.system == SYSTEM[0]:
        return SYSTEM
    return () if form.columns.system is None else (form.columns.system,)


def tool_keys(form: Form) -> tuple[str, ...]:
    """The keys of the tool descriptions; a column in dataset_info.json replaces them."""
    if form.name == "official" or form.columns.tools == TOOLS[0]:
        return TOOLS
    return () if form.columns.tools is None else (form.columns.tools,)


@cache
def record_keys(form: Form) -> frozenset[str]:
    """All keys that are read at the top level of a record."""
    columns = form.columns
    if form.name == "duplex":
        return frozenset((IDENTITY, DUPLEX, *SYSTEM))
    if form.name == "official":
        media = (*MEDIA_KINDS, *MEDIA_COLUMNS.values())
        return frozenset((IDENTITY, ANSWERS, OBJECTS, *TURN_LISTS, *media, *SYSTEM, *TOOLS))
    alpaca = (columns.prompt, columns.query, columns.response, columns.history)
    named = tuple(columns.media(kind) for kind in MEDIA_KINDS)
    named += alpaca if form.name == "alpaca" else (columns.messages,)
    return frozenset((IDENTITY, OBJECTS, *system_keys(form), *tool_keys(form), *filter(None, named)))


@cache
def turn_keys(form: Form) -> frozenset[str]:
    """All keys that are read in a turn."""
    names = _VOCABULARIES if form.name == "official" else ((form.tags.role_tag, form.tags.content_tag),)
    return MEDIA_OF_TURNS.union((name for pair in names for name in pair), LOSS, THOUGHT, CALLS, (RESULT_OF,))


@cache
def part_keys(kind: str) -> frozenset[str]:
    """All keys that are read in a content part of this type."""
    return frozenset(("type", "text")) if kind == "text" else frozenset(("type", *file_keys(kind)))


def file_keys(kind: str) -> tuple[str, ...]:
    """The keys of the file in a media part."""
    return (kind, f"{kind}_url", "path", "url")


def compared(record: Mapping[str, Any]) -> str:
    """The message, after "has", that a record has preference data; empty if it has none."""
    found = [key for key in COMPARED if record.get(key) or (key == "kto_tag" and record.get(key) is not None)]
    if found in ([], ["chosen"]):  # which alone may be the name of a column of answers
        return ""
    return (
        f"{' and '.join(map(repr, found))}: preference data; --stage dpo trains on pairs of 'chosen' and 'rejected'; "
        "for supervised finetuning keep the preferred answer (in 'output' or as the last turn) and remove these keys"
    )


def alone(given: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, Any] | None:
    """The key among synonyms that an object has, and its value; None if it has none of them.

    Args:
        given: a record or a turn.
        names: synonyms.
        where: prefix of the message: "", or such as "turn 3: ".

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
                f"{where}{first!r} is {written(value)} and {other!r} is {written(another)}, which are "
                "synonyms; keep one"
            )
    return first, value
