"""Detects the format of a data file (official, ShareGPT, Alpaca, OpenAI) from some of its records."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from finetune.data_files.json_values import json_cell
from finetune.readers import record_keys
from finetune.readers.answer_pairs import Comparison, split
from finetune.readers.forms import FROM_VALUE, OWN_NAMES, ROLE_CONTENT, WANTED, Columns, Form, FormName, Tags
from finetune.sample import MEDIA_COLUMNS, DataError, MediaKind
from finetune.utils.quoting import shown, words_of

DataFormat = Literal["auto", "official", "sharegpt", "alpaca", "openai", "duplex"]
DATA_FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)

INSPECTED = 20
"""Number of inspected records at the start, and as many evenly spaced ones from the rest."""

_CONVERSATION = ("messages", "conversations")


def some_records(records: Sequence[Any]) -> list[Any]:
    """The records for format detection; unreadable ones are skipped here and reported when they are accessed.

    Raises:
        DataError: none of them can be read.
    """
    rest = max(len(records) - INSPECTED, 0)
    later = {INSPECTED + number * rest // INSPECTED for number in range(INSPECTED if rest else 0)}
    found, fault = [], None
    for index in [*range(min(INSPECTED, len(records))), *sorted(later)]:
        try:
            found.append(records[index])
        except DataError as error:
            fault = fault or error
    if fault is not None and not found:
        raise fault
    return found


def choose(records: Sequence[Any], where: str, asked: DataFormat = "auto", *, pairs: bool = False) -> tuple[Form, str]:
    """The format of records without an entry in dataset_info.json, and the reason for it.

    Args:
        records: records from ``some_records``.
        where: the file, for errors.
        asked: a format, or "auto".
        pairs: whether they are preference pairs.

    Raises:
        DataError: the records match no format, or several ones that exclude each other.
        ValueError: no such format.
    """
    if asked not in DATA_FORMATS:
        raise ValueError(f"no data_format {asked!r}; there are {', '.join(DATA_FORMATS)}")
    objects = [record for record in records if isinstance(record, dict)]
    if pairs:
        objects = better_records(objects, Comparison(), where)
    if asked == "auto":
        name, why = _by_signs(objects, where, len(records))
    else:
        name, why = asked, "as asked for"
    if name in ("official", "duplex"):
        return Form(name), why
    alone: MediaKind | None = next((kind for record in objects for kind in MEDIA_COLUMNS if record.get(kind)), None)
    if alone is not None:
        raise DataError(
            f"{where}: records in the {name} format ({why}) have {alone!r}, which it does not support; name it "
            f"{MEDIA_COLUMNS[alone]!r} and put <{alone}> where the file belongs"
        )
    columns = replace(OWN_NAMES, messages=conversation_column(objects))
    return Form(name, columns, vocabulary(objects, columns.messages)), why


def better_records(records: Sequence[Mapping[str, Any]], names: Comparison, where: str) -> list[Mapping[str, Any]]:
    """The records of preference pairs with their chosen answer alone; others are reported when they are accessed.

    Raises:
        DataError: none of them is a pair.
    """
    found, fault = [], None
    for record in records:
        try:
            found.append(split(record, names)[0])
        except DataError as error:
            fault = fault or error
    if fault is not None and not found:
        raise DataError(f"{where}: none of the inspected records is a pair: the first {fault.args[0]}")
    return found


def conversation_column(records: Sequence[Mapping[str, Any]]) -> str:
    """The key of the list of turns."""
    return next((key for record in records for key in _CONVERSATION if record.get(key) is not None), "messages")


def vocabulary(records: Sequence[Mapping[str, Any]], column: str | None) -> Tags:
    """The tags of the turns: role and content, or from and value."""
    turns = [turn for record in records for turn in _turns(record, column)]
    has_role = any(turn.get("role") is not None for turn in turns)
    has_from = any(turn.get("from") is not None for turn in turns)
    return ROLE_CONTENT if has_role or not has_from else FROM_VALUE


def _turns(record: Mapping[str, Any], column: str | None) -> list[Mapping[str, Any]]:
    turns = None if column is None else json_cell(record.get(column))
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, (list, tuple)) else []


def _by_signs(records: Sequence[Mapping[str, Any]], where: str, inspected: int) -> tuple[FormName, str]:
    """The format by the keys of the records; plain turns are the official format."""
    for record in records:
        if compared := record_keys.compared(record):
            raise DataError(f"{where}: records have {compared}")
    conversations = [record for record in records if not record_keys.is_timeline(record)]
    if records and not conversations:
        sign = record_keys.DUPLEX if records[0].get(record_keys.DUPLEX) is not None else "tracks"
        return "duplex", f"the records have {sign!r}"
    records = conversations  # a full-duplex record among them is read as one
    plain = next((key for record in records for key in _CONVERSATION if record.get(key) is not None), None)
    signs = _first(sign for record in records for sign in _signs(record))
    if "openai" in signs:
        signs.pop("sharegpt", None)  # it has the same columns
    if plain and not signs:
        weak = _first(sign for record in records for sign in _weak_signs(record))
        signs = dict(sorted(weak.items())[:1])  # openai before sharegpt
    if plain and "alpaca" in signs:
        signs.setdefault("official", repr(plain))
    if len(signs) > 1:
        found = ", ".join(f"{sign} ({name})" for name, sign in signs.items())
        raise DataError(
            f"{where}: the {inspected} inspected records have {found}, which exclude each other; {WANTED}; split the "
            "file, or set the format (--data_format, formatting in dataset_info.json)"
        )
    if signs:
        ((name, sign),) = signs.items()
        return name, f"the records have {sign}"
    if plain:
        return "official", "plain turns"
    found = words_of(dict.fromkeys(key for record in records for key in record)) if records else "no object"
    raise DataError(f"{where}: the {inspected} inspected records match no format (found {found}); {WANTED}")


def _first(signs: Iterable[tuple[FormName, str]]) -> dict[FormName, str]:
    """The first sign of each format."""
    found: dict[FormName, str] = {}
    for name, sign in signs:
        found.setdefault(name, sign)
    return found


def _signs(record: Mapping[str, Any]) -> Iterator[tuple[FormName, str]]:
    """Keys of a record that only one format has."""
    if all(record.get(key) is None for key in _CONVERSATION):
        for key in ("instruction", "output"):
            if record.get(key) is not None:
                yield "alpaca", repr(key)
        return
    for key in filter(lambda kind: record.get(kind) is not None, MEDIA_COLUMNS):
        yield "official", repr(key)
    for key in filter(record.get, MEDIA_COLUMNS.values()):
        yield "sharegpt", repr(key)
    for turn in (turn for key in _CONVERSATION for turn in _turns(record, key)):
        if isinstance(turn.get("content"), (list, tuple)):
            yield "openai", "content as a list of parts"


def _weak_signs(record: Mapping[str, Any]) -> Iterator[tuple[FormName, str]]:
    """Keys that decide if there is no other sign: they may occur in every format with turns."""
    for turn in (turn for key in _CONVERSATION for turn in _turns(record, key)):
        if turn.get("tool_calls"):
            yield "openai", "'tool_calls'"
        word = turn.get("from") or turn.get("role")
        if word in ("observation", "function_call"):
            yield "sharegpt", f"turns of {shown(word, 40)}"
    for key in ("tools", "system"):
        if record.get(key):
            yield "sharegpt", repr(key)


def check_columns(records: Sequence[Any], columns: Columns, form: FormName, where: str) -> list[str]:
    """Warnings about ``columns`` of dataset_info.json: columns that no record has, and known keys without a column.

    Args:
        records: records from ``some_records``.
        columns: columns of the entry.
        form: format of the entry.
        where: the data set, for errors.

    Raises:
        DataError: no record has a required column, or a column whose name looks misspelt.
    """
    had = list(dict.fromkeys(key for record in records if isinstance(record, dict) for key in record))
    used = ("prompt", "query", "response", "history") if form == "alpaca" else ("messages",)
    warnings = []
    for name in (*used, "system", "tools", *MEDIA_COLUMNS.values()):
        column = getattr(columns, name)
        if column is None or column in had:
            continue
        close = difflib.get_close_matches(column, had, 1, cutoff=0.8)
        text = f"{where}: none of the {len(records)} inspected records has {column!r}, the column of {name}"
        found = f"(found {words_of(had)})"
        if close or name in ("messages", "response") or (name == "prompt" and columns.query not in had):
            hint = f"did you mean {close[0]!r}? Name it" if close else "name the right one"
            raise DataError(f"{text} {found}; {hint} under columns")
        # Other records may have it, or it is a table column without values.
        warnings.append(f"{text} {found}")
    named = {getattr(columns, name) for name in (*used, "system", "tools", *MEDIA_COLUMNS.values())}
    ours = {
        "system",
        "tools",
        *MEDIA_COLUMNS,
        *MEDIA_COLUMNS.values(),
        *({"input", "history"} if form == "alpaca" else ()),
    }
    filled = [key for key in had if key in ours - named and any(isinstance(r, dict) and r.get(key) for r in records)]
    if filled:
        warnings.append(
            f"{where}: records have {words_of(filled)}, not used, as dataset_info.json does not name them under columns"
        )
    return warnings
