"""Records with the same text and the same media, of one data set or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from finetune.encoding.likeness import content_of_file, identity
from finetune.pages.survey import Surveyed
from finetune.sample import DataError

_LETTERS = 200

Places = list[tuple[int, int]]
"""Records, by the number of their data set and their own."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """Records that are alike.

    Attributes:
        places: where they are, in words.
        across: whether they are of several data sets.
        text: how the first of their questions begins.
    """

    places: tuple[str, ...]
    across: bool
    text: str


def find(parts: Sequence[Surveyed]) -> list[Repeated]:
    """Groups of records that are alike, those of several data sets first, then the largest.

    Media are read only where the text and the sizes of files agree.
    """
    likely: dict[int, Places] = {}
    for part, found in enumerate(parts):
        for index, alike in zip(found.survey.indices, found.survey.alike, strict=True):
            likely.setdefault(alike, []).append((part, index))
    of_file = cache(content_of_file)
    same: dict[bytes, Places] = {}
    for part, index in (place for group in likely.values() if len(group) > 1 for place in group):
        try:
            key = identity(parts[part].records[index], of_file)
        except (DataError, OSError):
            continue  # it has changed since the check, which is the place to say so
        same.setdefault(key, []).append((part, index))
    repeated = [_repeated(parts, group) for group in same.values() if len(group) > 1]
    return sorted(repeated, key=lambda each: (not each.across, -len(each.places)))


def _repeated(parts: Sequence[Surveyed], group: Places) -> Repeated:
    samples = [parts[part].records[index] for part, index in group]
    text = next((message.text for message in samples[0].messages if message.role == "user"), "")
    across = len({part for part, _ in group}) > 1
    return Repeated(tuple(str(each.source) for each in samples), across, text.strip()[:_LETTERS])
