"""Media placeholders of other tools (``<|image_pad|>``, ``![](path)``, ...): converted to our tags, or reported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar
from urllib.parse import unquote

from finetune.readers.record_media import MediaFolders, is_there, read_medium
from finetune.sample import MEDIA_KINDS, DataError, Media, MediaKind, Sample, Text

_NAMES: dict[MediaKind, str] = {"image": "image|img", "video": "video", "audio": "audio|sound|speech"}

# Tokens between two marks are repeated if a tool has already expanded the placeholder.
_WRAPPED: dict[MediaKind, str] = {
    "image": r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>"
    r"|<\|begin_of_image\|>(?:<\|image\|>)*<\|end_of_image\|>"
    r"|<\|media_start\|>image<\|media_content\|>(?:<\|media_pad\|>)+<\|media_end\|>"
    r"|<start_of_image>(?:(?:<image_soft_token>)+<end_of_image>)?"
    r"|<img>(?:<IMG_CONTEXT>)*</img>|<IMG_CONTEXT>",
    "video": r"<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>",
    "audio": r"<\|audio_bos\|>(?:<\|audio\|>)+<\|audio_eos\|>|<\|audio_start\|>(?:<\|audio_pad\|>)+<\|audio_end\|>",
}
_SUFFIX = r"[ _-]?(?:here|pad|token|placeholder|soft_token|content)"
_MARKDOWN = r"!\[[^\[\]\n]*\]\((?P<markdown>(?:[^()\n]|\([^()\n]*\))+)\)"


def _pattern(kind: MediaKind) -> re.Pattern[str]:
    """All placeholder spellings of a kind; the first alternative that matches counts."""
    names = _NAMES[kind]
    quoted = r"""\bsrc\s*=\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s"'<>]+))"""
    alternatives = [
        rf"(?P<sure>\(<{kind}>\./</{kind}>\)|<{kind}>\./</{kind}>"
        + (r"|<im_start><image><im_end>" if kind == "image" else "")
        + ")",
        rf"<(?P<name>{names})>(?P<between>[^<>\n]+)</(?P=name)>",
        rf"<(?P<html>{names})\b[^<>]*?{quoted}[^<>]*>(?:\s*</(?P=html)>)?",
        *([_MARKDOWN, r"\[img\](?P<bbcode>[^\[\]\n]+)\[/img\]"] if kind == "image" else []),
        _WRAPPED[kind],
        rf"<\|(?:{names})(?:_?(?P<piped>\d+)|{_SUFFIX})?\|>",
        rf"<(?:{names})(?:[ _]?(?P<tagged>\d+)|{_SUFFIX})?\s*/?>",
        rf"\[(?:{names})(?:[ _]?(?P<bracketed>\d+))?\]",
    ]
    # The lookahead rejects other HTML elements at their second character.
    begins = rf"(?=\(?<\|?(?:{names}|vision_|begin_of|start_of|media_|im_start)|!?\[)"
    return re.compile(f"{begins}(?:{'|'.join(alternatives)})", re.IGNORECASE)


# Texts without any of these words are not searched.
_WORDS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("image", "img", "![", "media_pad"),
    "video": ("video",),
    "audio": ("audio", "sound", "speech"),
}
_STARTS = re.compile(r"[<(!\[]")
_PATTERNS = {kind: _pattern(kind) for kind in MEDIA_KINDS}
_PATHS = ("between", "double", "single", "bare", "markdown", "bbcode")
_NUMBERS = ("piped", "tagged", "bracketed")
_TITLE = re.compile(r"""\s+(?:"[^"]*"|'[^']*')\s*$""")
# In an answer these are legitimate content: HTML, or remarks of a transcript.
_PROSE = re.compile(r"</?img|\[", re.IGNORECASE)


class _Mark(NamedTuple):
    """A media placeholder in a text.

    Attributes:
        start: start position in the text.
        end: end position.
        kind: kind of media.
        spelling: its text for messages, without parts that differ between records.
        path: path of the file, if the placeholder has one.
        number: number of the file, if the placeholder has one.
        own: whether it is our own tag or an unambiguous equivalent.
        file: the file at ``path``.
    """

    start: int
    end: int
    kind: MediaKind
    spelling: str
    path: str | None = None
    number: int | None = None
    own: bool = False
    file: Media | None = None


def _marks(text: str, kind: MediaKind) -> Iterator[_Mark]:
    """The placeholders of a kind in reading order."""
    lowered = text.lower()
    if not any(word in lowered for word in _WORDS[kind]):
        return
    for found in _spelled(text, kind):
        start, end = found.span()
        groups = found.groupdict()
        path = next((groups[name] for name in _PATHS if groups.get(name) is not None), None)
        number = next((int(groups[name]) for name in _NUMBERS if groups.get(name) is not None), None)
        tag = f"<{kind}>"
        if groups["sure"] or found[0] == tag:
            yield _Mark(start, end, kind, found[0], own=True)
        elif path is not None:
            yield _Mark(start, end, kind, _named(found), _cleaned(path, groups.get("markdown") is not None))
        elif number is not None:
            yield _Mark(start, end, kind, re.sub(r"\d+", "N", found[0]), number=number)
        else:
            yield _Mark(start, end, kind, re.sub(r"(<[^<>]+>)\1+", r"\1", found[0]))


def _spelled(text: str, kind: MediaKind) -> Iterator[re.Match[str]]:
    """Matches in reading order; searching for a first character is faster than ``finditer`` with the long pattern."""
    at = 0
    while (start := _STARTS.search(text, at)) is not None:
        found = _PATTERNS[kind].match(text, start.start())
        at = start.end() if found is None else found.end()
        if found is not None:
            yield found


def _named(found: re.Match[str]) -> str:
    groups = found.groupdict()
    if groups["between"] is not None:
        return f"<{groups['name']}>PATH</{groups['name']}>"
    if groups["html"] is not None:
        return f"<{groups['html']} src=PATH>"
    return "![](PATH)" if groups["markdown"] is not None else "[img]PATH[/img]"


def _cleaned(path: str, markdown: bool) -> str:
    path = path.strip()
    if markdown:
        path = _TITLE.sub("", path)
        path = path[1:-1] if path.startswith("<") and path.endswith(">") else path
    return path


class _Turn(Protocol):
    """A turn of a record: a named tuple."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> Any: ...
    @property
    def files(self) -> Mapping[MediaKind, Any]: ...
    def _replace(self, *, content: Any = ..., files: Any = ...) -> Self: ...


AnyTurn = TypeVar("AnyTurn", bound=_Turn)


def to_tags(
    turns: Sequence[AnyTurn],
    files: Mapping[MediaKind, Any],
    where: MediaFolders,
    tag: re.Pattern[str],
) -> tuple[list[AnyTurn], dict[MediaKind, Any]]:
    """Turns with placeholders of other tools converted to our tags, and the files of all tags in reading order.

    A placeholder with the path of an existing file becomes the tag of that file, whether the record lists it or not.
    Placeholders without a path become tags if there are as many of them as remaining files. Others stay text. Records
    with media parts or our own tags are not changed.

    Args:
        turns: turns of the record.
        files: files listed in the record, by kind: a list, or an object by tag.
        where: base folders of relative paths.
        tag: pattern of our own tags.

    Raises:
        DataError: the text names some files, and other files of the record have no placeholder.
    """
    result, converted = list(turns), dict(files)
    if any(not isinstance(part, Text) for turn in turns if not isinstance(turn.content, str) for part in turn.content):
        return result, converted
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    for kind, listed in files.items():
        # Placeholders of a turn with own files belong to these files only.
        own = [number for number in users if result[number].files.get(kind)]
        for number in own:
            found = _converted(result, [number], kind, turns[number].files[kind], where, tag)
            result[number] = result[number]._replace(files={**result[number].files, kind: found})
        others = [number for number in users if number not in own]
        converted[kind] = _converted(result, others, kind, listed, where, tag)
    return result, converted


def _converted(
    turns: list[AnyTurn],
    asked: Sequence[int],
    kind: MediaKind,
    listed: Any,
    where: MediaFolders,
    tag: re.Pattern[str],
) -> Any:
    """The files of a kind for some turns, whose texts are rewritten in ``turns``."""
    texts = [text for number in asked for text in _texts(turns[number].content)]
    located = [_located(text, kind, where, tag) for text in texts]
    if isinstance(listed, dict) or all(mark.spelling == f"<{kind}>" for each in located for mark in each):
        return listed
    read, found = _read(located, kind, listed)
    written = iter([_written(text, each, kind) for text, each in zip(texts, read, strict=True)])
    for number in asked:
        turns[number] = turns[number]._replace(content=_rewritten(turns[number].content, written))
    return found


def _texts(content: str | Sequence[Text]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def _rewritten(content: str | Sequence[Text], written: Iterator[str]) -> str | tuple[Text, ...]:
    return next(written) if isinstance(content, str) else tuple(Text(next(written)) for _ in content)


def _written(text: str, marks: Sequence[_Mark], kind: MediaKind) -> str:
    """The text with these placeholders replaced by tags."""
    parts, end = [], 0
    for mark in marks:
        parts += [text[end : mark.start], f"<{kind}>"]
        end = mark.end
    return "".join([*parts, text[end:]])


def _located(text: str, kind: MediaKind, where: MediaFolders, tag: re.Pattern[str]) -> list[_Mark]:
    """The placeholders of a text, with the file of those that have an existing path."""
    found: list[_Mark] = []
    own = f"<{kind}>"
    for mark in _marks(text, kind):
        if mark.path is not None:
            medium = _file(mark.path, kind, where)
            if medium is not None:
                found.append(mark._replace(file=medium))
            elif text.startswith(own, mark.start):
                found.append(_Mark(mark.start, mark.start + len(own), kind, own, own=True))
        elif mark.own or not tag.fullmatch(text[mark.start : mark.end]):
            found.append(mark)
    return found


def _read(
    located: Sequence[Sequence[_Mark]], kind: MediaKind, listed: Sequence[Media]
) -> tuple[list[list[_Mark]], list[Media]]:
    """The placeholders of each text that become tags, and the files of a kind in reading order."""
    marks = [mark for each in located for mark in each]
    named = [mark.file for mark in marks if mark.file is not None]
    rest = _without(listed, named)
    bare = [mark for mark in marks if not mark.own and mark.file is None]
    owns = sum(mark.own for mark in marks)
    agree = len(rest) == owns + len(bare) and _in_order(bare)
    if named and not agree and owns != len(rest):
        raise DataError(
            f"{len(named)} {kind} files are named in the text, and beside them there are {owns} <{kind}> "
            f"for {len(rest)} other files; give every file one place, <{kind}> or its path"
        )
    kept = [[mark for mark in each if agree or mark.own or mark.file is not None] for each in located]
    if not any(kept):
        return kept, list(listed)
    queue = iter(rest)
    files = [mark.file or next(queue, None) for each in kept for mark in each]
    return kept, [*filter(None, files), *queue]


def _file(path: str, kind: MediaKind, where: MediaFolders) -> Media | None:
    """The file at the path of a placeholder, None if it does not exist."""
    if path.startswith(f"data:{kind}/"):
        return read_medium(path, kind, "the text", where)
    for name in dict.fromkeys((path, unquote(path))):
        if is_there(name, where):
            return read_medium(name, kind, "the text", where)
    return None


def _without(listed: Sequence[Media], named: Sequence[Media]) -> list[Media]:
    """The listed files that no placeholder names."""
    used = Counter(medium.files for medium in named if medium.files)
    rest = []
    for medium in listed:
        if used[medium.files] > 0:
            used[medium.files] -= 1
        else:
            rest.append(medium)
    return rest


def _in_order(marks: Sequence[_Mark]) -> bool:
    """Whether numbered placeholders are numbered in reading order, from 0 or 1."""
    numbers = [mark.number for mark in marks if mark.number is not None]
    return not numbers or numbers in ([*range(len(numbers))], [*range(1, len(numbers) + 1)])


_TURNS = {"user": "a user turn", "assistant": "an answer", "system": "the system prompt", "tool": "a tool turn"}
# Notes start with this text; the spelling of the placeholder follows.
_HEAD = "media placeholders kept as text in {}, since {}: {}"


def notes(sample: Sample) -> tuple[str, ...]:
    """Notes about placeholders that stay text; outside of user turns, only those that are not ordinary markup."""
    found: dict[str, None] = {}
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                for kind in MEDIA_KINDS:
                    for mark in _marks(part.text, kind):
                        if message.role == "user" or not _is_markup(mark, part.text):
                            found[_note(mark, message.role)] = None
    return tuple(found)


def _note(mark: _Mark, role: str) -> str:
    if role != "user":
        why = "only user turns have media"
    elif mark.own:
        why = "media are parts of the content"
    elif mark.path is not None:
        why = "no such file exists"
    else:
        why = "their number differs from the number of remaining files"
    return _HEAD.format(_TURNS[role], why, mark.spelling)


def _is_markup(mark: _Mark, text: str) -> bool:
    """Whether a placeholder outside of user turns is content: a path, HTML, or an element with a closing tag."""
    if mark.own and mark.spelling != f"<{mark.kind}>":
        return False
    closed = f"</{mark.spelling.strip('</> ')}>" in text[mark.end :]
    return mark.path is not None or closed or _PROSE.match(mark.spelling) is not None
