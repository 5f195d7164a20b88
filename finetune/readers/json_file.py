"""JSON files as people write them: arrays or lines, and an exact word on what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from finetune.sample import DataError


def load_records(path: Path) -> list[Any]:
    """The records of a JSON array or of JSON Lines (told apart by the first character), as plain Python values.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON (with line and cause), or holds no record.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file (looked from {Path.cwd()}); correct the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); give a JSON or JSON Lines file") from error
    start = text.lstrip()[:1]
    if start == "[":
        records = _parse(path, text)
    elif start == "{":
        records = _lines(path, text)
    elif not start:
        raise DataError(f"{path}: the file is empty; it should hold a JSON array of records")
    else:
        raise DataError(f"{path}, line 1: starts with {start!r}; expected a JSON array ([) or JSON Lines ({{)")
    if not records:
        raise DataError(f"{path}: the array has no record; training and evaluation need at least one")
    return records


def _lines(path: Path, text: str) -> list[Any]:
    records = []
    # Only \n ends a line of JSON Lines: other line breaks that Python knows may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if not records and line.strip() == "{":
                raise DataError(
                    f"{path}, line {number}: one object over several lines is neither a JSON array nor JSON Lines; "
                    "put [ in front of the first record and ] behind the last, or one record on each line"
                ) from error
            _explain(path, line, error, number - 1)
    return records


def _parse(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        _explain(path, text, error, 0)


def _explain(path: Path, text: str, error: json.JSONDecodeError, lines_before: int) -> NoReturn:
    """Raises the parser's complaint with the line and, where it can be told, the habit behind it."""
    at = error.pos
    here = text[at : at + 1]
    before = text[:at].rstrip()
    if here == "," and text[at + 1 :].lstrip()[:1] in ("]", "}"):
        before, here = text[: at + 1], text[at + 1 :].lstrip()[:1]
    if before.endswith(",") and here in ("]", "}"):
        # The comma is the fault, and it may stand lines above the bracket at which the parser stops.
        at = len(before) - 1
        cause = f"trailing comma before {here!r}; remove the comma"
    elif here == "'":
        cause = f"JSON needs double quotes, not single ones: {_excerpt(text, at)}"
    elif text.startswith(("None", "True", "False"), at):
        cause = f"{_excerpt(text, at)} is Python; JSON has null, true and false"
    elif text.startswith(("//", "#"), at):
        cause = "JSON has no comments; remove it"
    elif not text[at:].strip():
        cause = "the file ends in the middle of a record; was it copied completely?"
    else:
        cause = f"{error.msg} at {_excerpt(text, at)}"
    line = lines_before + text.count("\n", 0, at) + 1
    raise DataError(f"{path}, line {line}: not valid JSON: {cause}") from error


def _excerpt(text: str, at: int) -> str:
    return text[at : at + 40].split("\n")[0].rstrip() or repr(text[at : at + 1])
