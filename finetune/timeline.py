"""``Timeline``: who speaks when in a full-duplex record, on a grid of one-second units; no torch.

The grid is that of MiniCPM-o 4.5's published full-duplex inference: once per second it takes a second of user audio,
then either listens or speaks some text, which is heard during the next second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UNIT_MS = 1000
"""Length of a unit in milliseconds."""
LOOK_AHEAD_MS = 300
"""A word belongs to the unit that ends at most this long before the word is spoken."""
SDK_VERSION = "0.0.6"
"""Version of minicpm-o5-sdk that reads its records; 0.0.5 gives other ids for every record."""


def unit_of_word(milliseconds: int) -> int:
    """The unit whose text has a word that is spoken at this time: the first k with time < (k + 1) s + 0.3 s.

    The look-ahead of 0.3 s is that of minicpm-o5-sdk 0.0.6 (``spoken_prelook_sec``).

    >>> unit_of_word(0), unit_of_word(1299), unit_of_word(1300), unit_of_word(3200)
    (0, 0, 1, 2)
    """
    return max((milliseconds - LOOK_AHEAD_MS) // UNIT_MS, 0)


@dataclass(frozen=True, slots=True)
class SpokenTurn:
    """One turn of the model.

    Attributes:
        text: what it says.
        words: (first character, time in milliseconds from the start of the record) of every word, in order. Their
            ranges cover the text: a word ends where the next one starts, and the first starts at character 0.
    """

    text: str
    words: tuple[tuple[int, int], ...]

    @property
    def first_unit(self) -> int:
        """The unit of its first word."""
        return unit_of_word(self.words[0][1])

    @property
    def last_unit(self) -> int:
        """The unit of its last word, in which the turn ends."""
        return unit_of_word(self.words[-1][1])

    def texts(self) -> dict[int, str]:
        """The text of each unit; a unit in the middle without a word has no entry."""
        starts = self.starts()
        ends = [*[first for first, _ in starts[1:]], len(self.text)]
        return {unit: self.text[first:end] for (first, unit), end in zip(starts, ends, strict=True)}

    def starts(self) -> list[tuple[int, int]]:
        """(first character, unit) of the text of every unit that has some, in order."""
        found: list[tuple[int, int]] = []
        for first, time in self.words:
            unit = unit_of_word(time)
            if not found or found[-1][1] != unit:
                found.append((first, unit))
        return found


@dataclass(frozen=True, slots=True)
class PreparedIds:
    """Ids and labels of a record in the prompt o45_fc, as minicpm-o5-sdk gives them.

    Attributes:
        ids: token ids of the published vocabulary and of the 24 tokens behind it; no places for audio of the system
            turn.
        labels: as many, not shifted, -100 where there is no loss.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """The timeline of a full-duplex record.

    Attributes:
        turns: the turns of the model, in order; the units of two turns do not overlap.
        picture_units: the unit of every picture, in order.
        prepared: ids and labels of the prompt o45_fc; None for a record without them.
        unsupported: what the native prompt has no place for, in words.
    """

    turns: tuple[SpokenTurn, ...]
    picture_units: tuple[int, ...] = ()
    prepared: PreparedIds | None = None
    unsupported: tuple[str, ...] = ()


def least_units(turns: Sequence[SpokenTurn], picture_units: Sequence[int]) -> int:
    """Number of units that turns and pictures need, at least 1."""
    return 1 + max([0, *(turn.last_unit for turn in turns), *picture_units])
