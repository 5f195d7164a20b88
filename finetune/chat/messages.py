"""Messages as the published ``chat`` takes them become a Sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.chat.media_inputs import Picture, as_media, as_sound, as_video, from_base64, is_sound
from finetune.sample import VIDEO_SUFFIXES, DataError, Media, Message, Part, Sample, Source, Text

# Names under which the published examples give the text or the medium of a part.
_TEXT_KEYS = ("text", "pairs", "content")
_IMAGE_KEYS = ("image", "pairs", "content")
_AUDIO_KEYS = ("audio", "pairs", "content")
_VIDEO_KEYS = ("video", "pairs", "content")


def read_messages(
    msgs: Any,
    image: Picture | Sequence[Picture] | None = None,
    *,
    context: Sequence[Mapping[str, Any]] | None = None,
    system_prompt: str | None = None,
    index: int = 0,
    joint: str = "\n",
) -> Sample:
    """A conversation that the model is to go on with.

    Args:
        msgs: turns with ``role`` and ``content``, or their JSON. A content is a string, or a list of strings, pictures
            (PIL images, Paths, ``{"type": "image", "image": ...}`` also with base64) and sound (numpy arrays of samples
            at 16 kHz, Paths, ``{"type": "audio", "audio": ...}`` also with base64) and videos (Paths of files or of
            folders of frames, ``{"type": "video", "video": ...}`` also with a list of frames) in reading order.
        image: picture, or pictures, in front of the first user turn.
        context: turns before ``msgs``; ignored when ``msgs`` begin with them.
        system_prompt: text of a system turn in front.
        index: number of the conversation in its batch, for messages.
        joint: what stands between the items of a content.

    Raises:
        DataError: anything that does not fit this, or a conversation that leaves nothing to answer.
    """
    source = Source("chat", index)
    turns = _turns(msgs, source)
    if context:
        before = list(context)
        turns = turns if turns[: len(before)] == before else before + turns
    messages = [_message(turn, number, source, joint) for number, turn in enumerate(turns)]
    if system_prompt:
        if messages and messages[0].role == "system":
            raise DataError(f"{source}: system_prompt is given and msgs begin with a system turn; give one of them")
        messages.insert(0, Message("system", (Text(system_prompt),)))
    if image is not None:
        _put_in_front(messages, image, source)
    if messages and messages[-1].role == "assistant":
        raise DataError(f"{source}: the last turn is the assistant's; there is nothing to answer, add a user turn")
    return Sample(id="chat", source=source, messages=tuple(messages))


def _turns(msgs: Any, source: Source) -> list[Any]:
    if isinstance(msgs, (str, bytes)):
        try:
            msgs = json.loads(msgs)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}: the messages are a string that is not JSON: {error}") from error
    if not isinstance(msgs, (list, tuple)):
        raise DataError(f"{source}: the messages are {type(msgs).__name__}; give a list of turns, or its JSON")
    return list(msgs)


def _message(turn: Any, number: int, source: Source, joint: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
        raise DataError(f"{source}: turn {number} must be an object with 'role' and 'content'")
    content = turn["content"]
    pieces = list(content) if isinstance(content, (list, tuple)) else [content]
    parts: list[Part] = []
    for place, piece in enumerate(pieces):
        if place and joint:
            parts.append(Text(joint))
        parts.append(_part(piece, f"turn {number}", source))
    return Message(turn["role"], tuple(parts))


def _part(piece: Any, where: str, source: Source) -> Part:
    if isinstance(piece, str):
        return Text(piece)
    if isinstance(piece, np.ndarray) or (isinstance(piece, Path) and is_sound(piece)):
        return as_sound(piece, source)
    if isinstance(piece, Path) and (piece.suffix.lower() in VIDEO_SUFFIXES or piece.is_dir()):
        return as_video(piece, source)
    if isinstance(piece, (Image.Image, Path)):
        return as_media(piece, source)
    if isinstance(piece, Mapping):
        kind = piece.get("type")
        if kind == "text" and isinstance(text := _first(piece, _TEXT_KEYS), str):
            return Text(text)
        if kind == "image" and (picture := _first(piece, _IMAGE_KEYS)) is not None:
            return _picture(picture, source)
        if kind == "audio" and (sound := _first(piece, _AUDIO_KEYS)) is not None:
            return as_sound(sound, source)
        if kind == "video" and (video := _first(piece, _VIDEO_KEYS)) is not None:
            return as_video(video, source)
        raise DataError(f"{source}: {where} has a part of type {kind!r} with {', '.join(map(str, piece))}; {_WANTED}")
    raise DataError(f"{source}: {where} contains a {type(piece).__name__}; {_WANTED}")


_WANTED = (
    "parts are strings, PIL images, arrays of sound, Paths, {'type': 'text', 'text': ...}, "
    "{'type': 'image', 'image': ...}, {'type': 'audio', 'audio': ...} and {'type': 'video', 'video': ...}"
)


def _picture(picture: Any, source: Source) -> Media:
    """A picture inside a dictionary, where a string is base64."""
    if isinstance(picture, (str, bytes)):
        return Media("image", from_base64(picture, source))
    return as_media(picture, source)


def _first(piece: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((piece[key] for key in keys if key in piece), None)


def _put_in_front(messages: list[Message], image: Picture | Sequence[Picture], source: Source) -> None:
    pictures: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise DataError(f"{source}: an image is given, but no user turn to put it into")
    front: list[Part] = []
    for picture in pictures:
        front += [as_media(picture, source), Text("\n")]
    messages[first] = replace(messages[first], parts=(*front, *messages[first].parts))
