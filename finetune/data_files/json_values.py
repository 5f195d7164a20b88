"""Strict parsing of JSON values (duplicate keys, huge integers, deep nesting are refused), and names of their types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune.utils.quoting import shown

MOST_DIGITS = 4300
"""Maximum number of digits of an integer: Python's default limit of conversion."""


class ValueFault(ValueError):
    """Valid JSON that cannot be used; the message is a reason without its subject, the caller adds file and record."""


def parse(text: str | bytes) -> Any:
    """The value of JSON text. NaN and Infinity, which Python writes, are read as floats.

    Raises:
        ValueFault: a duplicate key in an object, an integer of more than MOST_DIGITS digits, or too deep nesting.
        json.JSONDecodeError: not JSON.
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    try:
        return _decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueFault("is nested too deeply to be read") from error


def written(value: Any, most: int = 60) -> str:
    """A value as JSON for messages, truncated."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError, TypeError):
        text = shown(value, most)
    return text if len(text) <= most else text[:most] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys must be unique: with duplicates it is unclear which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueFault(f"has the key {shown(twice, 60)} twice in one object; keep one")
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueFault(
            f"has an integer of {len(digits.lstrip('-'))} digits ({digits[:20]}...), more than the {MOST_DIGITS} that "
            "are read; write it as text"
        )
    return int(digits)


_decoder = json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer)


def json_cell(value: Any) -> Any:
    """The list or object of a CSV cell, which is JSON text; other values are unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse(value)
        except ValueError:
            return value  # a path may begin like this too
    return value


def json_type(value: Any) -> str:
    """The JSON type name of a value, with article."""
    names: Sequence[tuple[type | tuple[type, ...], str]] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (dict, "an object"),
        ((list, tuple), "a list"),
        (type(None), "null"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), f"a value of type {type(value).__name__}")
