"""Records of the official finetuning scripts: ``id``, ``image`` and ``conversations``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from finetune.readers.conversation import TrainOn, assemble, loss, turn_list
from finetune.readers.media import Places, is_embedded, json_cell, json_type, one
from finetune.readers.sharegpt import state
from finetune.sample import DataError, Media, Part, Sample, Source, Text

_TAG = re.compile(r"<image(?:_\d+)?>")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
FOREIGN = ("images", "video", "videos", "audio", "audios")
"""Keys of media that other forms use."""


class _Turn(NamedTuple):
    """One turn of a record; ``loss`` is whether an answer may be trained."""

    role: str
    content: str
    loss: bool


def sample(record: Mapping[str, Any], source: Source, where: Places, train_on: TrainOn) -> Sample:
    """The sample of a record.

    ``image`` is a path (its place is ``<image>``), a list of paths (``<image>`` once per path, in order), a dictionary
    from ``<image_00>``, ``<image_01>``, ... to paths (each tag once, anywhere), or absent. Without any tag the images
    stand in front of the first user turn, each followed by a newline; otherwise the text around a tag stays as it is.
    Tags count in user turns only: in other turns they are plain text. Turns have ``role`` and ``content``, or
    ``from`` and ``value`` (human, gpt). Every assistant turn is trained, or with ``train_on`` "last" the last
    one of the conversation, unless it has ``loss`` 0.

    Raises:
        DataError: the record is not of the official form, or an image file does not exist.
    """
    for key in FOREIGN:
        if record.get(key):
            raise DataError(
                f"{source}: has {key!r}, which the official form does not know; image paths belong under 'image' "
                "(or the file is of another form: --data_format sharegpt)"
            )
    turns = _turns(record, source)
    images = _images(json_cell(record.get("image")), source, where)
    placed = _place(turns, images, source)
    return assemble(
        [(turn.role, parts, turn.loss) for turn, parts in zip(turns, placed, strict=True)], source, train_on
    )


def _turns(record: Mapping[str, Any], source: Source) -> list[_Turn]:
    """Every turn, its values checked."""
    key = "messages" if record.get("conversations") is None and record.get("messages") is not None else "conversations"
    result = []
    for number, turn in enumerate(turn_list(record, key, source)):
        # Files of columns have every key in every turn, null where it is not used.
        tagged = turn.get("from") is not None and turn.get("role") is None
        names = ("from", "value") if tagged else ("role", "content")
        for name in names:
            if not isinstance(turn.get(name), str):
                raise DataError(f"{source}: turn {number}: {state(turn, name)}; it must be a string")
        role: str = turn[names[0]]
        role = _SHAREGPT.get(role, role) if tagged else role
        result.append(_Turn(role, turn[names[1]], loss(turn, role, number, source)))
    return result


def _images(given: Any, source: Source, where: Places) -> dict[str, Media] | list[Media]:
    """The images by tag when the record names tags, else in order."""
    if given is None:
        return []
    if isinstance(given, dict) and not is_embedded(given):
        for tag in given:
            if not _TAG.fullmatch(tag):
                raise DataError(f"{source}: 'image' has the key {tag!r}; keys must look like <image_00>")
        return {tag: _medium(path, source, where) for tag, path in given.items() if path is not None}
    return [_medium(path, source, where) for path in (given if isinstance(given, (list, tuple)) else [given])]


def _medium(given: Any, source: Source, where: Places) -> Media:
    if not is_embedded(given) and (not isinstance(given, str) or not given):
        what = "an empty string" if given == "" else json_type(given)
        raise DataError(f"{source}: an image path is {what}; give a path, or leave 'image' out of a text-only record")
    return one(given, "image", "image", source, where)


def _place(turns: Sequence[_Turn], images: dict[str, Media] | list[Media], source: Source) -> list[tuple[Part, ...]]:
    """The parts of every turn, with the images at their tags or in front of the first user turn."""
    found = [tag for turn in turns if turn.role == "user" for tag in _TAG.findall(turn.content)]
    if not found and images:
        if isinstance(images, list):
            return _in_front(turns, images, source)
        if list(images) == ["<image>"]:
            return _in_front(turns, list(images.values()), source)
    files = iter(_match(found, images, source))
    return [_split(turn.content, files) if turn.role == "user" else (Text(turn.content),) for turn in turns]


def _match(found: list[str], images: dict[str, Media] | list[Media], source: Source) -> list[Media]:
    """The file of every tag in reading order; tags and files must agree one to one."""
    if isinstance(images, dict):
        known = list(images)
        if sorted(found) != sorted(known):
            missing = [tag for tag in dict.fromkeys(found) if tag not in images]
            unused = [tag for tag in known if tag not in found]
            twice = [tag for tag in known if found.count(tag) > 1]
            faults = [
                f"{', '.join(tags)} {fault}"
                for tags, fault in (
                    (missing, "in the text without an image"),
                    (unused, "under 'image' but in no user turn"),
                    (twice, "more than once in the text"),
                )
                if tags
            ]
            raise DataError(f"{source}: tags and images disagree: {'; '.join(faults)}; give every image one tag")
        return [images[tag] for tag in found]
    numbered = [tag for tag in found if tag != "<image>"]
    if numbered:
        raise DataError(
            f"{source}: {', '.join(numbered)} in the text, but 'image' names no tags; write <image>, "
            "or make 'image' an object from tags to paths"
        )
    if len(found) != len(images):
        raise DataError(
            f"{source}: {len(found)} <image> in the user turns, {len(images)} images under 'image'; "
            "they must be as many (or no <image>, then the images stand in front)"
        )
    return images


def _in_front(turns: Sequence[_Turn], images: Sequence[Media], source: Source) -> list[tuple[Part, ...]]:
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError(f"{source}: has images but no user turn to put them in; add the question")
    result: list[tuple[Part, ...]] = [(Text(turn.content),) for turn in turns]
    lead = [part for image in images for part in (image, Text("\n"))]
    result[first] = (*lead, *result[first])
    return result


def _split(content: str, files: Iterator[Media]) -> tuple[Part, ...]:
    """The content with its tags replaced by the next files."""
    texts = _TAG.split(content)
    parts: list[Part] = [Text(texts[0])]
    for text in texts[1:]:
        parts += [next(files), Text(text)]
    return tuple(part for part in parts if not isinstance(part, Text) or part.text)
