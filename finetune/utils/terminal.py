"""Colours text on terminals that show colours (respects NO_COLOR)."""

from __future__ import annotations

import os
from typing import TextIO

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


def in_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose user has not set NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def red(text: str, stream: TextIO) -> str:
    """The text in red where the stream shows colours, else as it is."""
    return f"{_RED}{text}{_PLAIN}" if in_colour(stream) else text
