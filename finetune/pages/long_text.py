"""Long texts on a page: the beginning is shown, the rest on request, and what exceeds a size limit is counted."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import escape

from finetune.utils.quoting import plain

_SHOWN = 1_000
"""Characters that are visible at once."""


@dataclass(frozen=True, slots=True)
class LongText:
    """A text as a page shows it.

    Attributes:
        head: its visible beginning.
        rest: what follows, shown on request.
        left_out: number of characters after that, which are not on the page.
    """

    head: str
    rest: str
    left_out: int


def shorten(text: str, room: int) -> LongText:
    """A text of which a page has at most ``room`` bytes.

    >>> shorten("short", 100)
    LongText(head='short', rest='', left_out=0)
    """
    kept = text[:room]
    while kept and (size := markup_bytes(kept)) > room:
        kept = kept[: min(len(kept) - 1, len(kept) * room // size)]
    visible = kept if len(kept) <= _SHOWN * 3 // 2 else kept[:_SHOWN]
    return LongText(visible, kept[len(visible) :], len(text) - len(kept))


def markup_bytes(text: str) -> int:
    """Bytes of a text in the markup of a page, where some characters are written as several."""
    return len(str(escape(plain(text))).encode(errors="replace"))
