"""Full-duplex records: user audio, pictures and the model's speech on one timeline, under the key ``duplex``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data_files.json_values import json_cell, json_type, written
from finetune.readers import record_keys
from finetune.readers.record_media import MediaFolders, read_medium
from finetune.sample import DataError, Media, Message, Part, Text, Track
from finetune.timeline import UNIT_MS, SpokenTurn, Timeline, least_units
from finetune.utils.quoting import shown, words_of

_KEYS = ("unit", "seconds", "reference", "user", "images", "assistant")
_LONGEST = 1800
"""Seconds; the longest audio that is decoded (``media.audio.MAX_SECONDS``)."""
# Speaking rates for text without word times: about 150 English words or 270 Chinese characters per minute.
_RATE, _RATE_CJK = 15.0, 4.5
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"\s*(?:[{_CJK}]|[^\s{_CJK}]+)")
_ONE_CJK = re.compile(rf"[{_CJK}]")
SAMPLES_PER_MS = 16
"""Audio samples per millisecond, at 16 kHz."""
MOST_CHARACTERS = 28
"""Characters per unit at which the published inference cuts the text of a unit (MiniCPM-o-Demo, o 4.5)."""
UNTIMED = (
    f"text of the model without word times ('words'), spread from its start at {_RATE:g} characters per second "
    f"({_RATE_CJK:g} for Chinese, Japanese and Korean)"
)
TOO_DENSE = f"a unit with more than {MOST_CHARACTERS} characters, which the published inference never says in a second"


def read_timeline(
    record: Mapping[str, Any], where: MediaFolders
) -> tuple[tuple[Message, ...], Timeline, tuple[str, ...]]:
    """Messages, timeline and notes of a full-duplex record.

    ``duplex`` is an object: ``user`` (clips, each ``audio`` and ``start``), ``assistant`` (turns, each ``text``,
    ``start`` and optionally ``words``: [text, start, end] with times from the start of the turn), and optionally
    ``images`` (each ``image`` and ``start``), ``reference`` (audio of the voice, for the system turn) and ``seconds``
    (length; otherwise as long as its parts). All times are seconds. The system text is a key of the record, as in
    other forms.

    Raises:
        DataError: an unknown key, a value of another type, times that contradict each other, or a missing file.
    """
    given = json_cell(record[record_keys.DUPLEX])
    if not isinstance(given, dict):
        raise DataError(
            f"{record_keys.DUPLEX!r} is {json_type(given)}; it must be an object with 'user' and 'assistant'"
        )
    _check_keys(given, _KEYS, f"{record_keys.DUPLEX!r}")
    if given.get("unit", 1) != 1:
        raise DataError(f"'unit' is {written(given['unit'])}; units of the native prompt last 1.0 second")
    for key in ("conversations", "messages", *record_keys.TOOLS):
        if record.get(key):
            raise DataError(f"has {record_keys.DUPLEX!r} and {key!r}; a full-duplex record has no turns and no tools")
    turns = tuple(_turns(_objects(given, "assistant")))
    pictures = sorted(_media(given, "images", "image", where), key=lambda each: each[0])
    clips = tuple(_media(given, "user", "audio", where))
    if not clips:
        raise DataError("'user' has no clip; the model listens every second: give user audio, which may be silence")
    units = tuple(start // UNIT_MS for start, _ in pictures)
    timeline = Timeline(turns, units)
    track = Track(
        tuple((start * SAMPLES_PER_MS, clip) for start, clip in clips),
        _seconds(given, turns, units),
        given.get("seconds") is not None,
    )
    heard = Message("user", (*(medium for _, medium in pictures), Media("audio", track)))
    said = Message("assistant", tuple(Text(turn.text) for turn in turns), train=True)
    return (*_system(record, given, where), heard, said), timeline, tuple(_notes(given, turns))


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"{where} has the key {shown(key, 60)}, which is not read; {hint}Known are {words_of(known)}"
            )


def _objects(given: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    values = given.get(key)
    if values is None:
        return []
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, dict) for each in values):
        raise DataError(f"{key!r} must be a list of objects, each with 'start'; it is {json_type(values)}")
    return list(values)


def _milliseconds(value: Any, what: str) -> int:
    seconds = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not seconds or not math.isfinite(value) or not 0 <= value <= _LONGEST:
        raise DataError(f"{what} is {written(value)}; it must be a time in seconds, from 0 to {_LONGEST}")
    return round(value * 1000)


def _media(given: Mapping[str, Any], key: str, kind: Any, where: MediaFolders) -> Iterator[tuple[int, Media]]:
    for number, each in enumerate(_objects(given, key)):
        at = f"{key}[{number}]"
        _check_keys(each, (kind, "start"), at)
        if not each.get(kind):
            raise DataError(f"{at} has no {kind!r}; give the path of a file")
        yield _milliseconds(each.get("start"), f"'start' of {at}"), read_medium(each[kind], kind, kind, where)


def _system(record: Mapping[str, Any], given: Mapping[str, Any], where: MediaFolders) -> Iterator[Message]:
    name, text = record_keys.alone(record, record_keys.SYSTEM, "") or ("", "")
    if not isinstance(text, str):
        raise DataError(f"{name!r} is {json_type(text)}; the system prompt must be a string")
    reference = given.get("reference")
    parts: tuple[Part, ...] = (Text(text),) if text else ()
    if reference:
        parts = (*parts, read_medium(reference, "audio", "reference", where))
    if parts:
        yield Message("system", parts)


def _turns(objects: Sequence[Mapping[str, Any]]) -> Iterator[SpokenTurn]:
    before: SpokenTurn | None = None
    for number, given in enumerate(objects):
        at = f"assistant[{number}]"
        _check_keys(given, ("text", "start", "words"), at)
        text = given.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{at} has no text; give what the model says, or remove the turn")
        start = _milliseconds(given.get("start"), f"'start' of {at}")
        words = given.get("words")
        turn = SpokenTurn(text, tuple(_paced(text, start) if words is None else _timed(text, start, words, at)))
        if before is not None and turn.first_unit <= before.last_unit:
            raise DataError(
                f"{at} begins in second {turn.first_unit}, and the turn before it ends in second {before.last_unit}; "
                "turns must be in order, and a second has text of one turn: move the start, or join them"
            )
        if turn.last_unit >= _LONGEST:
            raise DataError(
                f"{at} is still speaking in second {turn.last_unit}; a record lasts at most {_LONGEST} seconds"
            )
        before = turn
        yield turn


def _paced(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The words of a text at the stated rates."""
    time = float(start)
    for found in _WORD.finditer(text):
        yield found.start(), int(time)
        slow = len(_ONE_CJK.findall(found[0]))
        time += 1000 * (slow / _RATE_CJK + (len(found[0]) - slow) / _RATE)


def _timed(text: str, start: int, words: Any, at: str) -> Iterator[tuple[int, int]]:
    """The words of a text at their own times; white space between words belongs to the next one."""
    if not isinstance(words, (list, tuple)) or not words:
        raise DataError(f"'words' of {at} must be a list of [text, start, end], or left out; it is {written(words)}")
    end = before = 0
    for number, word in enumerate(words):
        here = f"words[{number}] of {at}"
        if (
            not isinstance(word, (list, tuple))
            or len(word) not in (2, 3)
            or not isinstance(word[0], str)
            or not word[0]
        ):
            raise DataError(
                f"{here} is {written(word)}; it must be [text, start, end], with times from the turn's start"
            )
        time = _milliseconds(word[1], f"the start of {here}")
        if time < before or (len(word) == 3 and _milliseconds(word[2], f"the end of {here}") < time):
            raise DataError(f"{here} is {written(word)}; words must be in order, and end after they start")
        gap = len(text) - end - len(text[end:].lstrip())
        first = end + (0 if text.startswith(word[0], end) else gap)
        if not text.startswith(word[0], first):
            raise DataError(
                f"{here} is {written(word[0])}, and the text goes on with {written(text[end : end + 40])}; the words "
                "together must be the text"
            )
        yield end, start + time
        end, before = first + len(word[0]), time
    if text[end:].strip():
        raise DataError(f"'words' of {at} end before {written(text[end:][:40])}; the words together must be the text")


def _seconds(given: Mapping[str, Any], turns: Sequence[SpokenTurn], units: Sequence[int]) -> int:
    """Number of units that the record needs without its audio, or has by 'seconds'."""
    needed = least_units(turns, units)
    seconds = given.get("seconds")
    if seconds is None:
        return needed
    if not isinstance(seconds, (int, float)) or not 1 <= seconds <= _LONGEST or seconds != int(seconds):
        raise DataError(f"'seconds' is {written(seconds)}; it must be a whole number, from 1 to {_LONGEST}")
    if seconds < needed:
        raise DataError(
            f"'seconds' is {written(seconds)}, and text or a picture belongs to second {needed - 1} (counted from 0); "
            "raise 'seconds' or remove it"
        )
    return int(seconds)


def _notes(given: Mapping[str, Any], turns: Sequence[SpokenTurn]) -> Iterator[str]:
    if any(each.get("words") is None for each in _objects(given, "assistant")):
        yield UNTIMED
    if any(len(text) > MOST_CHARACTERS for turn in turns for text in turn.texts().values()):
        yield TOO_DENSE
