"""Records of the official finetuning scripts: ``id``, ``image`` and ``conversations``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

from finetune.readers.json_file import load_records
from finetune.sample import DataError, Media, Message, Part, Sample, Source, Text

_TAG = re.compile(r"<image(?:_\d+)?>")
TrainOn = Literal["all", "last"]
TRAIN_ON: tuple[TrainOn, ...] = get_args(TrainOn)
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_FOREIGN = ("images", "video", "videos", "audio", "audios")


class _Turn(NamedTuple):
    """One turn of a record; ``loss`` is whether an answer may be trained."""

    role: str
    content: str
    loss: bool


class OfficialDataset(Sequence[Sample]):
    """A data file; records are parsed at once, samples are built when asked for, images are never opened here.

    ``image`` is a path (its place is ``<image>``), a list of paths (``<image>`` once per path, in order), a dictionary
    from ``<image_00>``, ``<image_01>``, ... to paths (each tag once, anywhere), or absent. Without any tag the images
    stand in front of the first user turn, each followed by a newline; otherwise the text around a tag stays as it is.
    Tags count in user turns only: in other turns they are plain text. Turns have ``role`` and ``content``, or
    ``from`` and ``value`` (human, gpt). Every assistant turn is trained, or with ``train_on`` "last" the last
    one of the conversation, unless it has ``loss`` 0.

    Args:
        path: a JSON array, or JSON Lines.
        image_root: second place to look for relative image paths; the first is the folder of the data file, the last
            the current directory.
        train_on: one of TRAIN_ON.

    Raises:
        DataError: the file cannot be read as JSON records.
        ValueError: no such ``train_on``.
    """

    def __init__(self, path: str | Path, *, image_root: str | Path | None = None, train_on: TrainOn = "all") -> None:
        if train_on not in TRAIN_ON:
            raise ValueError(f"no train_on {train_on!r}; there are {', '.join(TRAIN_ON)}")
        self.train_on: TrainOn = train_on
        self._file = Path(path)
        self._records = load_records(self._file)
        # Resolved now: a later change of directory must not move the data.
        places = [self._file.resolve().parent, *([Path(image_root).resolve()] if image_root else []), Path.cwd()]
        self._places = list(dict.fromkeys(places))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample at ``index``.

        Raises:
            DataError: the record is not of the official form, or an image file does not exist.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return _sample(self._records[index], self.source(range(len(self))[index]), self._places, self.train_on)

    def source(self, index: int) -> Source:
        """Where record ``index`` is and what its id is, whether or not it makes a sample."""
        record = self._records[index]
        identity = record.get("id") if isinstance(record, dict) else None
        return Source(str(self._file), index, "" if identity is None else str(identity))


def _sample(record: Any, source: Source, places: Sequence[Path], train_on: TrainOn) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"{source}: is {_type(record)}, not an object with 'conversations'")
    for key in _FOREIGN:
        if record.get(key):
            raise DataError(f"{source}: has {key!r}, which this format does not know; image paths belong under 'image'")
    turns = _turns(record, source)
    images = _images(record.get("image"), source, places)
    placed = _place(turns, images, source)
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    trained = answers if train_on == "all" else answers[-1:]
    messages = tuple(
        Message(turn.role, content, train=index in trained and turn.loss)
        for index, (turn, content) in enumerate(zip(turns, placed, strict=True))
    )
    return Sample(id=source.id or str(source.index), source=source, messages=messages)


def _turns(record: dict[str, Any], source: Source) -> list[_Turn]:
    """Every turn, its values checked."""
    key = next((name for name in ("conversations", "messages") if name in record), None)
    if key is None:
        found = ", ".join(map(repr, record)) or "nothing"
        raise DataError(f"{source}: has no 'conversations' (found {found}); add the list of turns")
    turns = record[key]
    if not isinstance(turns, list):
        raise DataError(f"{source}: {key!r} is {_type(turns)}; it must be a list of turns")
    result = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{source}: turn {number} is {_type(turn)}; it must be an object with 'role' and 'content'")
        names = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        for name in names:
            if not isinstance(turn.get(name), str):
                state = (
                    f"is {_type(turn[name])}" if name in turn else f"is missing (found {', '.join(map(repr, turn))})"
                )
                raise DataError(f"{source}: turn {number}: {name!r} {state}; it must be a string")
        role: str = turn[names[0]]
        role = _SHAREGPT.get(role, role) if names[0] == "from" else role
        result.append(_Turn(role, turn[names[1]], _loss(turn, role, number, source)))
    return result


def _loss(turn: dict[str, Any], role: str, number: int, source: Source) -> bool:
    """Whether the turn may be trained: its ``loss``, 1 where it has none."""
    loss = turn.get("loss", 1)
    if not isinstance(loss, int) or loss not in (0, 1):
        raise DataError(
            f"{source}: turn {number}: 'loss' is {json.dumps(loss)}; it must be 1 (train the answer) or 0 (do not)"
        )
    if turn.get("loss") and role != "assistant":
        raise DataError(
            f"{source}: turn {number}: 'loss' is 1 in a {role} turn; only answers are trained, remove it there"
        )
    return bool(loss)


def _images(given: Any, source: Source, places: Sequence[Path]) -> dict[str, Path] | list[Path]:
    """The image files by tag when the record names tags, else in order."""
    if given is None:
        return []
    if isinstance(given, dict):
        for tag in given:
            if not _TAG.fullmatch(tag):
                raise DataError(f"{source}: 'image' has the key {tag!r}; keys must look like <image_00>")
        return {tag: _find(path, source, places) for tag, path in given.items()}
    return [_find(path, source, places) for path in (given if isinstance(given, list) else [given])]


def _find(path: Any, source: Source, places: Sequence[Path]) -> Path:
    if not isinstance(path, str) or not path:
        what = "an empty string" if path == "" else _type(path)
        raise DataError(f"{source}: an image path is {what}; give a path, or leave 'image' out of a text-only record")
    tried = [place / path for place in places] if not Path(path).is_absolute() else [Path(path)]
    for candidate in tried:
        if candidate.exists():
            return candidate
    looked = ", ".join(str(candidate) for candidate in tried)
    raise DataError(
        f"{source}: image {path!r} does not exist (looked for {looked}); correct the path or give --image_root"
    )


def _place(turns: Sequence[_Turn], images: dict[str, Path] | list[Path], source: Source) -> list[tuple[Part, ...]]:
    """The parts of every turn, with the images at their tags or in front of the first user turn."""
    found = [tag for turn in turns if turn.role == "user" for tag in _TAG.findall(turn.content)]
    if not found and images:
        if isinstance(images, list):
            return _in_front(turns, images, source)
        if list(images) == ["<image>"]:
            return _in_front(turns, list(images.values()), source)
    paths = iter(_match(found, images, source))
    return [_split(turn.content, paths) if turn.role == "user" else (Text(turn.content),) for turn in turns]


def _match(found: list[str], images: dict[str, Path] | list[Path], source: Source) -> list[Path]:
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


def _in_front(turns: Sequence[_Turn], images: Sequence[Path], source: Source) -> list[tuple[Part, ...]]:
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError(f"{source}: has images but no user turn to put them in; add the question")
    result: list[tuple[Part, ...]] = [(Text(turn.content),) for turn in turns]
    lead = [part for path in images for part in (Media("image", path), Text("\n"))]
    result[first] = (*lead, *result[first])
    return result


def _split(content: str, paths: Iterator[Path]) -> tuple[Part, ...]:
    """The content with its tags replaced by the next files."""
    texts = _TAG.split(content)
    parts: list[Part] = [Text(texts[0])]
    for text in texts[1:]:
        parts += [Media("image", next(paths)), Text(text)]
    return tuple(part for part in parts if not isinstance(part, Text) or part.text)


def _type(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
