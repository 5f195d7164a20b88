"""Quotes values of files and records in messages: truncated, on one line, control characters escaped."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Iterable

LONGEST = 120
"""Most characters of a quoted value."""

_KEPT = "\n\t"


def plain(text: str) -> str:
    r"""The text with control characters, lone surrogates and bidirectional marks written as escapes.

    Line breaks and tabs stay.

    >>> print(plain("a\x1b[31mb"))
    a\x1b[31mb
    """
    # The usual case, tested in C.
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in _KEPT or _is_space(each) else _escaped(each) for each in text)


def shown(value: object, most: int = LONGEST) -> str:
    """A value as a message quotes it: strings in quotation marks, truncated after ``most`` characters.

    >>> shown("a" * 200, 10)
    "'aaaaaaaaaa'... (200 characters)"
    """
    if isinstance(value, str):
        if len(value) <= most:
            return repr(value)
        return f"{value[:most]!r}... ({len(value)} characters)"
    brief = reprlib.Repr()
    brief.maxlong = brief.maxstring = brief.maxother = most
    text = brief.repr(value)
    return text if len(text) <= most else text[:most] + "..."


def words_of(words: Iterable[object], most: int = 12) -> str:
    """Values as a message lists them, at most ``most``; "nothing" for an empty list.

    >>> words_of(["a", "b", "c"], 2)
    "'a', 'b' and 1 more"
    """
    found = [shown(word, 60) for word in words]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return (", ".join(found[:most]) + more) or "nothing"


def truncate_middle(text: str, most: int = 300) -> str:
    """The text truncated in the middle to ``most`` characters, for paths in messages."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}[...{len(text) - most // 2 * 2} characters...]{text[-(most // 2) :]}"


def reason(error: OSError | ValueError) -> str:
    """The system's message about a file, without the path that messages have already."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _is_space(character: str) -> bool:
    """Whether it is a Unicode space (category Zs)."""
    return unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]
