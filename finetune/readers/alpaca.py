"""Alpaca format: instruction, input and output columns, and the history as a list of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data_files.json_values import json_cell, json_type
from finetune.readers.conversation import Conversation, TrainOn, build
from finetune.readers.forms import Form
from finetune.readers.record_media import MediaFolders
from finetune.readers.turns import Turn
from finetune.sample import DataError
from finetune.utils.quoting import shown, words_of


def conversation(record: Mapping[str, Any], where: MediaFolders, train_on: TrainOn, form: Form) -> Conversation:
    """The conversation of a record: history, prompt and query in one turn, the response; all answers are trained.

    Raises:
        DataError: the record is not in this format, numbers of tags and files differ, or a file is missing.
    """
    columns = form.columns
    turns = list(_history(record, columns.history))
    asked = [_text(record, column) for column in (columns.prompt, columns.query)]
    question = "\n".join(text for text in asked if text)
    if not question:
        named = " and ".join(repr(column) for column in (columns.prompt, columns.query) if column) or "no column"
        raise DataError(f"{named} for the prompt: empty or missing (found {_keys(record)}); give the question")
    if columns.response is None:
        raise DataError("no column is named for the answer; name it under columns: response")
    turns.append(Turn("user", question))
    answer = record.get(columns.response)
    if isinstance(answer, str):
        turns.append(Turn("assistant", answer))
    elif columns.response in record:  # without it the record can be answered, not trained
        raise DataError(f"{columns.response!r} is {json_type(answer)}; it must be the answer, a string")
    return build(turns, record, form, where, train_on)


def _text(record: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {json_type(value)}; it must be a string")
    return value


def _history(record: Mapping[str, Any], column: str | None) -> Iterator[Turn]:
    pairs = None if column is None else json_cell(record.get(column))
    if not pairs:
        return
    if not isinstance(pairs, (list, tuple)):
        raise DataError(f"{column!r} is {json_type(pairs)}; it must be a list of [prompt, response] pairs")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"{column!r}, entry {number} is {shown(pair, 60)}; it must be a pair of strings, [prompt, response]"
            )
        yield Turn("user", pair[0])
        yield Turn("assistant", pair[1])


def _keys(record: Mapping[str, Any]) -> str:
    return words_of(record)
