"""Chat messages, as the published chat() takes them, to samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.sample import VIDEO_SUFFIXES, DataError, Media, Message, Part, Sample, Source, Text
from finetune.utils.quoting import shown

CHAT = Source("chat", 0)


def parts(content: Any, source: Source, turn: int) -> tuple[Part, ...]:
    """The parts of one message: a string, an image, or a list of both, joined by newlines as chat() joins them.

    Args:
        content: strings and PIL images (or Path objects of image and video files).
        source: named in errors.
        turn: number of the turn, named in errors.

    Raises:
        DataError: a value that is none of these.
    """
    result: list[Part] = []
    for value in content if isinstance(content, (list, tuple)) else [content]:
        if result:
            result.append(Text("\n"))
        if isinstance(value, str):
            result.append(Text(value))
        elif isinstance(value, Path) and value.suffix.lower() in VIDEO_SUFFIXES:
            result.append(Media("video", value))
        elif isinstance(value, (Image.Image, Path)):
            result.append(Media("image", value))
        else:
            raise DataError(
                f"{source}: turn {turn} contains a value of type {type(value).__name__}; give strings and PIL images "
                "(image and video files as pathlib.Path)"
            )
    return tuple(result)


def sample(
    messages: Sequence[Mapping[str, Any]],
    *,
    image: Image.Image | Path | None = None,
    system_prompt: str | None = None,
    source: Source = CHAT,
) -> Sample:
    """A conversation to answer; no turn of it is trained.

    Args:
        messages: turns with ``role`` and ``content``.
        image: put in front of the first message, as chat(image=...) does.
        system_prompt: put in front of the conversation as a system turn.
        source: named in errors.

    Raises:
        DataError: a turn without role or content, content of the wrong type, or turns that make no conversation.
    """
    turns: list[Message] = []
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{source}: turn {turn} is {shown(message, 80)}; it needs 'role' and 'content'")
        content = message["content"]
        if turn == 0 and image is not None:
            content = [image, *(content if isinstance(content, (list, tuple)) else [content])]
        turns.append(Message(message["role"], parts(content, source, turn)))
    if system_prompt:
        turns.insert(0, Message("system", (Text(system_prompt),)))
    return Sample(id="chat", source=source, messages=tuple(turns))
