"""Byte offsets of the records of a JSON file, found by parsing every record once with bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finetune.data_files.json_errors import beginning, explain, explain_line, newlines, not_utf8, unreadable
from finetune.sample import DataError
from finetune.utils.file_types import told

_BLOCK = 1 << 22
_BOM = "\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
# After an element: a comma and the start of the next one, or the end of the array.
_NEXT = re.compile(r"[ \t\r\n]*(?:,[ \t\r\n]*(?=[^ \t\r\n])|(\]))")
# Maximum length of a token other than a string: an error further from the end of a block is not caused by its end.
_TOKEN = 16
# Only offsets are needed: numbers are not converted.
_parse = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode


def scan(path: Path, file: BinaryIO) -> Iterator[array[int]]:
    """(start, end) offsets of every record of a JSON array or JSON Lines file (detected by the first character).

    Every record is parsed, so invalid files are refused. Memory: a block of 4 MiB, or the largest record.

    Args:
        path: path for errors.
        file: the file, opened in binary mode.

    Yields:
        Offsets, two per record, one array per block.

    Raises:
        DataError: not UTF-8, not JSON (with line and cause), or no record.
    """
    window = _Window(path, file)
    try:
        file.seek(0)
        window.read_on(0)
        at = window.skip_space(len(_BOM) if window.text.startswith(_BOM) else 0)
        start = window.text[at : at + 1]
        if not start:
            raise DataError(f"{path}: the file is empty; it should hold a JSON array of records (copied completely?)")
        if start not in "[{":
            start = window.text[at : at + 4].encode("latin-1").decode(errors="ignore")[:1]
            if (kind := told(beginning(file))) is not None:
                raise DataError(f"{path}: {kind}")
            line = newlines(file, window.base + at) + 1
            raise DataError(f"{path}, line {line}: starts with {start!r}; expected a JSON array ([) or JSON Lines ({{)")
        yield from _array(window, at) if start == "[" else _lines(window, at)
    except RecursionError as error:
        raise DataError(f"{path}: a record is nested too deeply to be parsed; is this the right file?") from error
    except OSError as error:
        raise unreadable(path, error) from error


class _Window:
    """A sliding window over a file that is being parsed.

    Its text is decoded as Latin-1, one character per byte, so that positions are byte offsets. This does not matter to
    a JSON parser, since non-ASCII characters occur in strings only. UTF-8 validity is checked separately.

    Attributes:
        text: the content of the window.
        base: offset of its first byte in the file.
        ended: whether it reaches the end of the file.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.base, self.ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_on(self, keep: int) -> bool:
        """Drops the text before ``keep`` and reads on, at least a block; False at the end of the file."""
        self.base += keep
        self.text = self.text[keep:]
        # Doubles the window, so that a record of many blocks is not parsed once per block.
        block = self.file.read(max(_BLOCK, len(self.text)))
        pending = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, self.base + len(self.text) - pending + error.start, self.file) from error
        self.text += block.decode("latin-1")
        self.ended = not block
        return not self.ended

    def skip_space(self, at: int) -> int:
        """Position of the next non-space character; the end of the text at the end of the file."""
        while (at := _SPACE.match(self.text, at).end()) == len(self.text) and self.read_on(at):  # pyright: ignore[reportOptionalMemberAccess]
            at = 0
        return min(at, len(self.text))

    def fault(self, at: int, message: str) -> DataError:
        """The error for invalid JSON at a position of the text."""
        return explain(self.path, self.file, self.base + at, message)


def _array(window: _Window, at: int) -> Iterator[array[int]]:
    at = window.skip_space(at + 1)
    closed = window.text[at : at + 1] == "]"
    if closed:
        raise DataError(f"{window.path}: the array has no record; training and evaluation need at least one")
    while not closed:
        spans: array[int] = array("q")
        at, fault = _elements(window.text, window.base, at, spans)
        yield spans
        closed = fault is None
        if fault is not None:
            early = fault.pos < len(window.text) - _TOKEN and not fault.msg.startswith("Unterminated string")
            if early or not window.read_on(at):
                raise window.fault(fault.pos - (0 if early else at), fault.msg) from fault
            at = 0
    at = window.skip_space(at)
    if at < len(window.text):
        raise window.fault(at, "Extra data")


def _elements(text: str, base: int, at: int, spans: array[int]) -> tuple[int, json.JSONDecodeError | None]:
    """Appends the spans of complete array elements from ``at`` on; returns the end and, unless the array ended, why."""
    add, following = spans.append, _NEXT.match
    try:
        while True:
            _, end = _parse(text, at)
            found = following(text, end)
            if found is None:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, _SPACE.match(text, end).end())  # pyright: ignore[reportOptionalMemberAccess]
            add(base + at)
            add(base + end)
            at = found.end()
            if found.lastindex:
                return at, None
    except json.JSONDecodeError as error:
        return at, error


def _lines(window: _Window, at: int) -> Iterator[array[int]]:
    alone = True
    while (at := window.skip_space(at)) < len(window.text):
        spans: array[int] = array("q")
        at, bad = _whole_lines(window, at, spans)
        alone = alone and not spans
        yield spans
        if bad:
            end = window.text.find("\n", at)
            end = len(window.text) if end < 0 else end
            raise explain_line(window.path, window.file, window.base + at, window.base + end, alone=alone)
        if not window.ended:
            window.read_on(at)
            at = 0


def _whole_lines(window: _Window, at: int, spans: array[int]) -> tuple[int, bool]:
    """Appends the spans of complete lines from ``at`` on; returns the end, and whether it is an invalid line."""
    text, base, ended = window.text, window.base, window.ended
    add, find, space = spans.append, text.find, _SPACE.match
    while at < len(text):
        # Only \n ends a line of JSON Lines: other line breaks of Python may occur inside strings.
        line_end = find("\n", at)
        if line_end < 0:
            if not ended:
                break
            line_end = len(text)
        try:
            _, end = _parse(text, at)
        except json.JSONDecodeError:
            return at, True
        following = space(text, end).end()  # pyright: ignore[reportOptionalMemberAccess]
        if end > line_end or following < line_end:
            return at, True
        add(base + at)
        add(base + end)
        at = following
    return at, False
