"""Preference data (``--stage dpo``): splits a record into one per answer, and joins the two samples into a pair.

The spellings are those of LLaMA-Factory (``chosen`` and ``rejected`` beside turns or an instruction), ms-swift
(``rejected_response``, ``rejected_messages``), TRL (``prompt``, ``chosen``, ``rejected``: strings or conversations) and
RLAIF-V (``question``, ``chosen``, ``rejected``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.data_files.json_values import json_cell, json_type
from finetune.readers import record_keys
from finetune.sample import MEDIA_COLUMNS, DataError, Media, Message, Sample, Text

_PROMPTS = ("prompt", "question")
"""Keys of a question as a string."""
_SWIFT = ("rejected_response", "rejected_messages")
SAME = "both answers are the same"
"""Note about a pair that teaches nothing."""


class Comparison(NamedTuple):
    """The keys of the two answers in a record.

    Attributes:
        chosen: key of the chosen answer.
        rejected: key of the rejected answer.
        messages: key of the turns.
        response: key of the answer beside an instruction.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    messages: str | None = None
    response: str = "output"


Record = Mapping[str, Any]


def split(record: Record, names: Comparison) -> tuple[Record, Record]:
    """The record with the chosen answer alone, and with the rejected one.

    Raises:
        DataError: it has no pair of answers, or one in several or in unsupported spellings.
    """
    if refused := [key for key in record_keys.UNPAIRED if record.get(key) is not None and record.get(key) != []]:
        raise DataError(f"has {refused[0]!r}, which is not read: give both answers as 'chosen' and 'rejected'")
    given = [key for key in (names.rejected, *_SWIFT) if record.get(key)]
    if not given:
        raise DataError(
            "has no rejected answer, and --stage dpo trains on pairs: give it as 'rejected', or train with --stage sft"
        )
    if len(given) > 1:
        raise DataError(f"has {' and '.join(map(repr, given))}, two names for the rejected answer; keep one")
    rest = {key: value for key, value in record.items() if key not in (names.chosen, names.rejected, *_SWIFT)}
    if given[0] == names.rejected:
        return _compared(rest, record.get(names.chosen), record[names.rejected], names)
    if record.get(names.chosen):
        raise DataError(f"has {names.chosen!r} and {given[0]!r}; the chosen answer of {given[0]!r} is the last turn")
    key, turns = _turns(rest, names)
    if given[0] == "rejected_messages":
        return rest, {**rest, key: record["rejected_messages"]}
    if not turns or not isinstance(record["rejected_response"], str):
        raise DataError(
            f"'rejected_response' is {json_type(record['rejected_response'])}; it must be a string, in place of the "
            f"last answer of {key!r}"
        )
    content = "value" if "value" in turns[-1] else "content"
    return rest, {**rest, key: [*turns[:-1], {**turns[-1], content: record["rejected_response"]}]}


def _compared(rest: dict[str, Any], chosen: Any, rejected: Any, names: Comparison) -> tuple[Record, Record]:
    """Two records for answers under keys of their own."""
    if not chosen:
        raise DataError(f"has {names.rejected!r} but no {names.chosen!r}; give both answers")
    chosen, rejected = _answer(chosen, names.chosen), _answer(rejected, names.rejected)
    if type(chosen) is not type(rejected):
        raise DataError(
            f"{names.chosen!r} is {json_type(chosen)} and {names.rejected!r} is {json_type(rejected)}; write both alike"
        )
    return _answered(rest, chosen, names), _answered(rest, rejected, names)


def _answer(given: Any, key: str) -> str | dict[str, Any] | list[Any]:
    """An answer: a string, a turn, or turns."""
    if isinstance(given, str) and given.strip()[:1] in ("[", "{"):
        parsed = json_cell(given)  # a cell of a table
        turns = parsed if isinstance(parsed, list) else [parsed]
        given = parsed if turns and all(_is_turn(turn) for turn in turns) else given
    if isinstance(given, tuple):
        given = list(given)
    if not isinstance(given, (str, dict, list)):
        raise DataError(f"{key!r} is {json_type(given)}; it must be an answer: a string, a turn or a list of turns")
    return given


def _is_turn(given: Any) -> bool:
    return isinstance(given, dict) and not {"role", "from"}.isdisjoint(given)


def _answered(rest: dict[str, Any], answer: str | dict[str, Any] | list[Any], names: Comparison) -> Record:
    """The record with one answer, in a form with turns or with an instruction."""
    question = next((key for key in _PROMPTS if isinstance(rest.get(key), str) and not _is_list(rest[key])), None)
    if question is not None and isinstance(answer, str) and not _has_turns(rest, names):
        turns: list[Any] = [{"role": "user", "content": rest[question]}, {"role": "assistant", "content": answer}]
        return _official({key: value for key, value in rest.items() if key != question}, turns)
    if _has_turns(rest, names):
        key, turns = _turns(rest, names)
        turns = [*turns, *_as_turns(answer, turns)]
        if key == "prompt":
            return _official({name: value for name, value in rest.items() if name != key}, turns)
        return {**rest, key: turns}
    if isinstance(answer, list):  # whole conversations, with the prompt in both
        return _official(rest, answer)
    text = answer if isinstance(answer, str) else answer.get("value", answer.get("content"))
    return {**rest, names.response: text}


def _is_list(given: Any) -> bool:
    return isinstance(json_cell(given), list)


def _has_turns(rest: Record, names: Comparison) -> bool:
    return any(_is_list(rest.get(key)) for key in _turn_keys(names))


def _turn_keys(names: Comparison) -> tuple[str, ...]:
    return (*filter(None, [names.messages]), *record_keys.TURN_LISTS, "prompt")


def _turns(rest: Record, names: Comparison) -> tuple[str, list[Any]]:
    """The key of the turns, and the turns."""
    for key in _turn_keys(names):
        if isinstance(turns := json_cell(rest.get(key)), (list, tuple)):
            return key, list(turns)
    raise DataError("has no list of turns that the answers belong to; give it under 'messages'")


def _as_turns(answer: str | dict[str, Any] | list[Any], turns: Sequence[Any]) -> list[Any]:
    if isinstance(answer, list):
        return answer
    if isinstance(answer, dict):
        return [answer]
    sharegpt = any(isinstance(turn, dict) and turn.get("from") is not None for turn in turns)
    return [{"from": "gpt", "value": answer} if sharegpt else {"role": "assistant", "content": answer}]


def _official(rest: dict[str, Any], turns: list[Any]) -> Record:
    """A record of turns whose media come first unless its texts have tags, as TRL and RLAIF-V mean it."""
    key = "messages"
    if any(isinstance(turn, dict) and isinstance(turn.get("content"), (list, tuple)) for turn in turns):
        return {**rest, key: turns}  # parts say where media belong
    one = {many: kind for kind, many in MEDIA_COLUMNS.items() if kind not in rest}
    return {**{one.get(name, name): value for name, value in rest.items()}, key: turns}


def pair_of(chosen: Sample, rejected: Sample) -> Sample:
    """The sample of a pair, from the samples of both of its records; only the last answers are trained.

    Raises:
        DataError: they differ in more than the last answer.
    """
    if len(chosen.messages) != len(rejected.messages):
        raise DataError(
            f"the chosen answer ends a conversation of {len(chosen.messages)} turns, the rejected one of "
            f"{len(rejected.messages)}; both must answer the same turns"
        )
    for number, (one, other) in enumerate(zip(chosen.messages[:-1], rejected.messages[:-1], strict=True)):
        if _content(one) != _content(other):
            raise DataError(f"turn {number} differs between both answers; only the last turn may differ")
    if chosen.messages[-1].role != "assistant" or rejected.messages[-1].role != "assistant":
        raise DataError("the conversation does not end with an answer; the last turn must be the assistant's")
    if not chosen.messages[-1].train or not rejected.messages[-1].train:
        raise DataError("the last answer has loss 0; the answers of a pair are what is trained")
    messages = tuple(_untrained(message) for message in chosen.messages[:-1])
    notes = tuple(dict.fromkeys((*chosen.notes, *rejected.notes)))
    if _content(chosen.messages[-1]) == _content(rejected.messages[-1]):
        notes = (*notes, SAME)
    return Sample(
        chosen.id, chosen.source, (*messages, chosen.messages[-1]), notes, chosen.tools, rejected=rejected.messages[-1]
    )


def _content(message: Message) -> tuple[Any, ...]:
    parts = [part.text if isinstance(part, Text) else _medium(part) for part in message.parts]
    return message.role, parts, message.thought, message.calls


def _medium(medium: Media) -> tuple[Any, ...]:
    return medium.kind, medium.files


def _untrained(message: Message) -> Message:
    return message if not message.train else Message(message.role, message.parts, False, message.thought, message.calls)
