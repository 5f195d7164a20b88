"""Reads JSON files that hold an object (every error is one line that names the file); numbers that JSON can hold."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.utils.errors import CheckpointError, UserError

_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF8: "UTF-8 with a byte order mark"}


def read_object(path: Path, kind: type[UserError] = CheckpointError, remedy: str = "") -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.
        kind: of the error.
        remedy: what to do, for the message; by default to get the file again.

    Raises:
        UserError: of that kind: the file cannot be read, is not JSON in UTF-8, or holds something else.
    """
    remedy = remedy or "copy or download it again"
    value = parse(read_text(path, kind), str(path), kind, remedy)
    if not isinstance(value, dict):
        raise kind(f"{path} is {type_name(value)}; it should be an object {{...}}: {remedy}")
    return value


def parse(text: str, name: str, kind: type[UserError] = CheckpointError, remedy: str = "") -> Any:
    """The value of JSON text that came from ``name``.

    Raises:
        UserError: of the kind asked for: it is not JSON.
    """
    remedy = remedy or "copy or download it again"
    if not text.strip():
        raise kind(f"{name} is empty: {remedy}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{error.msg}, line {error.lineno} column {error.colno}"
        raise kind(f"{name} is not valid JSON ({place}): {remedy}") from error
    except ValueError as error:  # a number of thousands of digits
        raise kind(f"{name} has a number that cannot be read: {remedy}") from error
    except RecursionError as error:
        raise kind(f"{name} is nested too deeply to be read: {remedy}") from error


def read_text(path: Path, kind: type[UserError] = CheckpointError) -> str:
    """A text file in UTF-8.

    Raises:
        UserError: of the kind asked for: it cannot be read, or is no such text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror or error})") from error
    if mark := next((name for mark, name in _MARKS.items() if data.startswith(mark)), None):
        raise kind(f"{path} is {mark}; it should be plain UTF-8: convert it, or download it again")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise kind(f"{path} is no text in UTF-8 (byte {error.start}); copy or download it again") from error


def type_name(value: Any) -> str:
    """The type of a JSON value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {shown(value)}"
    return {str: "a text", list: "a list", dict: "an object"}[type(value)]


def shown(value: Any) -> str:
    """A JSON value for a message, truncated to 60 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nonfinite_as_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with null in place of numbers that are not finite: NaN and Infinity are not JSON."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
