"""Converts the ``msgs`` argument of the published ``model.chat`` into a Sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.chat.media_inputs import ImageInput, as_audio, as_media, as_video, from_base64, is_audio
from finetune.sample import VIDEO_SUFFIXES, DataError, Media, Message, Part, Sample, Source, Text
from finetune.utils.errors import located

# Keys under which the published examples give the text or the media of a part.
_TEXT_KEYS = ("text", "pairs", "content")
_IMAGE_KEYS = ("image", "pairs", "content")
_AUDIO_KEYS = ("audio", "pairs", "content")
_VIDEO_KEYS = ("video", "pairs", "content")


def read_messages(
    msgs: Any,
    image: ImageInput | Sequence[ImageInput] | None = None,
    *,
    context: Sequence[Mapping[str, Any]] | None = None,
    system_prompt: str | None = None,
    index: int = 0,
    joint: str = "\n",
) -> Sample:
    """A conversation for the model to continue.

    Args:
        msgs: turns with ``role`` and ``content``, or their JSON. A content is a string, or a list of strings, images
            (PIL images, Paths, ``{"type": "image", "image": ...}`` also with base64) and audio (numpy arrays of samples
            at 16 kHz, Paths, ``{"type": "audio", "audio": ...}`` also with base64) and videos (Paths of files or of
            folders of frames, ``{"type": "video", "video": ...}`` also with a list of frames) in reading order.
        image: image, or list of images, in front of the first user turn.
        context: turns before ``msgs``; ignored when ``msgs`` begin with them.
        system_prompt: text of a system turn in front.
        index: position of the conversation in its batch, for error messages.
        joint: separator between the items of a content.

    Raises:
        DataError: malformed messages, or a conversation that does not end with a user turn.
    """
    source = Source("chat", index)
    with located(source):
        messages = _messages(_turns(msgs), image, context, system_prompt, joint)
    return Sample(id="chat", source=source, messages=tuple(messages))


def _messages(
    turns: list[Any],
    image: ImageInput | Sequence[ImageInput] | None,
    context: Sequence[Mapping[str, Any]] | None,
    system_prompt: str | None,
    joint: str,
) -> list[Message]:
    if context:
        before = list(context)
        turns = turns if turns[: len(before)] == before else before + turns
    messages = [_message(turn, number, joint) for number, turn in enumerate(turns)]
    if system_prompt:
        if messages and messages[0].role == "system":
            raise DataError("system_prompt is given and msgs begin with a system turn; give one of them")
        messages.insert(0, Message("system", (Text(system_prompt),)))
    if image is not None:
        _put_in_front(messages, image)
    if messages and messages[-1].role == "assistant":
        raise DataError("the last turn is the assistant's; there is nothing to answer, add a user turn")
    return messages


def _turns(msgs: Any) -> list[Any]:
    if isinstance(msgs, (str, bytes)):
        try:
            msgs = json.loads(msgs)
        except json.JSONDecodeError as error:
            raise DataError(f"the messages are a string that is not JSON: {error}") from error
    if not isinstance(msgs, (list, tuple)):
        raise DataError(f"the messages are {type(msgs).__name__}; give a list of turns, or its JSON")
    return list(msgs)


def _message(turn: Any, number: int, joint: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
        raise DataError(f"turn {number} must be an object with 'role' and 'content'")
    content = turn["content"]
    items = list(content) if isinstance(content, (list, tuple)) else [content]
    parts: list[Part] = []
    for place, item in enumerate(items):
        if place and joint:
            parts.append(Text(joint))
        parts.append(_part(item, f"turn {number}"))
    return Message(turn["role"], tuple(parts))


def _part(item: Any, where: str) -> Part:
    if isinstance(item, str):
        return Text(item)
    if isinstance(item, np.ndarray) or (isinstance(item, Path) and is_audio(item)):
        return as_audio(item)
    if isinstance(item, Path) and (item.suffix.lower() in VIDEO_SUFFIXES or item.is_dir()):
        return as_video(item)
    if isinstance(item, (Image.Image, Path)):
        return as_media(item)
    if isinstance(item, Mapping):
        kind = item.get("type")
        if kind == "text" and isinstance(text := _first(item, _TEXT_KEYS), str):
            return Text(text)
        if kind == "image" and (image := _first(item, _IMAGE_KEYS)) is not None:
            return _image(image)
        if kind == "audio" and (audio := _first(item, _AUDIO_KEYS)) is not None:
            return as_audio(audio)
        if kind == "video" and (video := _first(item, _VIDEO_KEYS)) is not None:
            return as_video(video)
        raise DataError(f"{where} has a part of type {kind!r} with {', '.join(map(str, item))}; {_WANTED}")
    raise DataError(f"{where} contains a {type(item).__name__}; {_WANTED}")


_WANTED = (
    "parts are strings, PIL images, audio arrays, Paths, {'type': 'text', 'text': ...}, "
    "{'type': 'image', 'image': ...}, {'type': 'audio', 'audio': ...} and {'type': 'video', 'video': ...}"
)


def _image(image: Any) -> Media:
    """The image of a ``{"type": "image"}`` part, where a string is base64."""
    if isinstance(image, (str, bytes)):
        return Media("image", from_base64(image))
    return as_media(image)


def _first(item: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((item[key] for key in keys if key in item), None)


def _put_in_front(messages: list[Message], image: ImageInput | Sequence[ImageInput]) -> None:
    images: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise DataError("an image is given, but no user turn to put it into")
    front: list[Part] = []
    for each in images:
        front += [as_media(each), Text("\n")]
    messages[first] = replace(messages[first], parts=(*front, *messages[first].parts))
