"""Error messages for invalid JSON: the line number, and the likely cause (trailing comma, single quotes, ...)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

from finetune.sample import DataError
from finetune.utils.file_types import told
from finetune.utils.paths import did_you_mean
from finetune.utils.quoting import reason

# Bytes around an error that are inspected.
_AROUND = 1 << 16
_BLOCK = 1 << 22
_HEAD = 512


def explain(path: Path, file: BinaryIO, at: int, message: str, line: tuple[int, int] | None = None) -> DataError:
    """The error for invalid JSON in a file, with its line and, if known, its cause.

    Args:
        path: path for the message.
        file: the open file.
        at: byte at which the parser stopped.
        message: message of the parser.
        line: (start, end) of the line in JSON Lines; None in an array.
    """
    first, end = line or (0, None)
    start = max(at - _AROUND, first)
    before, after = _read(file, start, at), _read(file, at, at + _AROUND if end is None else min(at + _AROUND, end))
    lines = newlines(file, at) + 1
    rest = before.rstrip()
    here = after[:1]
    if here == "," and after[1:].lstrip()[:1] in ("]", "}"):
        rest, here = before + ",", after[1:].lstrip()[:1]
    python = line is None  # whether Python would read the file as one list
    if rest.endswith(",") and here in ("]", "}"):
        # The comma may be several lines above the bracket at which the parser stops.
        lines -= before.count("\n", len(rest))
        cause = f"trailing comma before {here!r}; remove the comma"
    elif here == "'":
        cause = f"JSON needs double quotes, not single ones: {_excerpt(after)}"
    elif after.startswith(("None", "True", "False")):
        cause = f"{_excerpt(after)} is Python syntax; JSON has null, true and false"
    elif after.startswith(("//", "#")):
        python = python and after.startswith("#")
        cause = "JSON has no comments; remove it"
    elif not after.strip() or (message.startswith("Unterminated string") and _is_end(file, at, after)):
        python = False
        what = "file" if line is None else "line"
        cause = f"the {what} ends in the middle of a record; was the file copied completely?"
    else:
        python = False
        cause = f"{message.removesuffix(' at')} at {_excerpt(after)}"
    convert = f"; python -m finetune check --data {path} --write_json OUT.json converts it to JSON" if python else ""
    return DataError(f"{path}, line {lines}: not valid JSON: {cause}{convert}")


def explain_line(path: Path, file: BinaryIO, start: int, end: int, *, alone: bool) -> DataError:
    """The error for a line of JSON Lines that is not a record.

    Args:
        path: path for the message.
        file: the open file.
        start: first byte of the line.
        end: byte after the line.
        alone: whether it is the first record.
    """
    text = _read(file, start, end)
    if alone and text.strip() == "{":
        return DataError(
            f"{path}, line {newlines(file, start) + 1}: one object over several lines is neither a JSON array nor "
            "JSON Lines; put [ before the first record and ] after the last, or write one record per line"
        )
    try:
        json.JSONDecoder(parse_int=str).decode(text)
    except json.JSONDecodeError as error:
        return explain(path, file, start + len(text[: error.pos].encode()), error.msg, (start, end))
    raise AssertionError(f"{path}: bytes {start} to {end} are a record")


def beginning(file: BinaryIO) -> bytes:
    """The first bytes of an open file, to detect its type."""
    file.seek(0)
    return file.read(_HEAD)


def not_utf8(path: Path, at: int, file: BinaryIO) -> DataError:
    """The error for invalid UTF-8."""
    if (kind := told(beginning(file))) is not None:
        return DataError(f"{path}: {kind}")
    return DataError(f"{path}: not UTF-8 at byte {at}; save the file as UTF-8")


def unreadable(path: Path, error: OSError | ValueError) -> DataError:
    """The error for a file that does not exist or cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such data file{did_you_mean(path)} (looked in {Path.cwd()}); correct the path")
    return DataError(f"{path}: cannot be read ({reason(error)}); give a readable data file")


def _is_end(file: BinaryIO, at: int, after: str) -> bool:
    """Whether a string that begins at a byte is the last text of the file."""
    return '"' not in after[1:] and file.seek(0, os.SEEK_END) <= at + _AROUND


def _read(file: BinaryIO, start: int, end: int) -> str:
    file.seek(start)
    # The range may start or end within a character.
    return file.read(end - start).decode(errors="ignore")


def newlines(file: BinaryIO, end: int) -> int:
    """Number of line feeds before a byte."""
    file.seek(0)
    count = 0
    while end > 0 and (block := file.read(min(end, _BLOCK))):
        count += block.count(b"\n")
        end -= len(block)
    return count


def _excerpt(text: str) -> str:
    return text[:40].split("\n")[0].rstrip() or repr(text[:1])
