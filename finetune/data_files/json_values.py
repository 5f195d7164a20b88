"""JSON text to plain Python values, with what Python's own parser takes for values and no record can mean refused."""

from __future__ import annotations

import json
from typing import Any

from finetune.utils.quoting import shown

MOST_DIGITS = 4300
"""Of an integer: what Python converts at most, by default."""


class ValueFault(ValueError):
    """Valid JSON that cannot be taken; the message says why, to stand behind its place."""


def parse(text: str | bytes) -> Any:
    """The value of JSON text. NaN and Infinity, which Python writes, are read as floats.

    Raises:
        ValueFault: a key that an object has twice, an integer of more digits than MOST_DIGITS, or nested too deeply.
        json.JSONDecodeError: not JSON.
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    try:
        return _decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueFault("is nested too deeply to be read") from error


def written(value: Any, most: int = 60) -> str:
    """A value of a file as messages show it: as JSON, cut where it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError, TypeError):
        text = shown(value, most)
    return text if len(text) <= most else text[:most] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose keys stands there once: of two values neither is the one that is meant."""
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
