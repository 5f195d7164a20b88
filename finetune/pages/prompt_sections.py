"""The prompt of a sample for the preview page: both ends visible, the middle on request, and a limit on its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import Fitted
from finetune.pages.decoded_prompt import PromptPart, prompt_parts
from finetune.pages.long_text import markup_bytes

Runs = list[tuple[str, list[PromptPart]]]
"""Prompt parts in runs of one kind: "medium", "trained" or "context"; without token ids "trained plain" and so on."""

_SHOWN = 300
"""Prompt parts visible at either end of a long conversation."""
_NEAR = 40
"""Prompt parts in which the beginning of a word is looked for."""
_TOKEN = 27
"""Bytes of markup per token with its id."""
_MOST = 200_000
"""Bytes of one conversation, whatever the room: a reader sees nothing in more, and decoding takes seconds."""


@dataclass(frozen=True, slots=True)
class PromptSections:
    """The prompt of a sample in sections, in order.

    Attributes:
        head: visible.
        before: shown on request.
        left_out: number of tokens that are not on the page.
        after: shown on request, behind the tokens left out.
        tail: visible.
        hidden: number of tokens of ``before`` and ``after``.
        spent: bytes on the page.
    """

    head: Runs
    before: Runs
    left_out: int
    after: Runs
    tail: Runs
    hidden: int
    spent: int

    @property
    def sections(self) -> tuple[Runs, ...]:
        """All sections in order."""
        return self.head, self.before, self.after, self.tail


def prompt_sections(encoder: Encoder, fitted: Fitted, room: int) -> PromptSections:
    """The prompt of a sample in about ``room`` bytes: of a longer one the middle is left out, then token ids."""
    room = min(room, _MOST)
    first, last, left_out = _both_ends(encoder, fitted, room * 2 // 3)
    if not left_out:
        first, last = [*first, *last], []
    if len(first) <= 3 * _SHOWN and not left_out:
        sections = [first, [], [], []]
    else:
        before, after = (first, last) if left_out else (first, first)
        begin, end = _word_start(before, _SHOWN), _word_start(after, max(len(after) - _SHOWN, 0))
        middle = (before[begin:], after[:end]) if left_out else (before[begin:end], [])
        sections = [before[:begin], *middle, after[end:]]
    spent = sum(markup_bytes(part.text) for section in sections for part in section)
    made: dict[int, Runs] = {}
    for place in (0, 3, 1, 2):  # what is visible has ids before what is not
        made[place], spent = _runs(sections[place], spent, room)
    hidden = sum(part.tokens for section in sections[1:3] for part in section)
    return PromptSections(made[0], made[1], left_out, made[2], made[3], hidden, spent)


def _word_start(parts: Sequence[PromptPart], place: int) -> int:
    """The first place from ``place`` on where a word begins, if one is near."""
    near = range(place, min(place + _NEAR, len(parts)))
    return next(
        (each for each in near if parts[each].control or parts[each].text[:1].isspace()), min(place, len(parts))
    )


def _both_ends(encoder: Encoder, fitted: Fitted, room: int) -> tuple[list[PromptPart], list[PromptPart], int]:
    """The prompt parts from the beginning, those from the end, and the number of tokens between them."""
    total, first, spent = len(fitted.rendered.input_ids), [], 0
    stream: Iterator[PromptPart] = prompt_parts(encoder, fitted)
    for part in stream:
        first.append(part)
        spent += markup_bytes(part.text)
        if spent >= room // 2:
            break
    else:
        return first, [], 0
    end = first[-1].first + first[-1].tokens
    # Not decoded from the beginning: the text may have millions of tokens. Each takes a byte or more.
    start = max(end, total - room // 2)
    last = [part for part in prompt_parts(encoder, fitted, range(start)) if part.first >= start]
    spent = sum(markup_bytes(part.text) for part in last)
    dropped = 0
    while dropped < len(last) - 1 and spent > room // 2:
        spent -= markup_bytes(last[dropped].text)
        dropped += 1
    last = last[dropped:]
    return first, last, (last[0].first if last else total) - end


def _runs(parts: Sequence[PromptPart], spent: int, room: int) -> tuple[Runs, int]:
    """The parts in runs of one kind, with token ids while there is room; and the bytes spent."""
    kinds = []
    for part in parts:
        kind = "medium" if part.medium is not None else "trained" if part.trained else "context"
        with_ids = kind == "medium" or spent + _TOKEN <= room
        spent += _TOKEN if with_ids else 0
        kinds.append((kind if with_ids else f"{kind} plain", part))
    return [(kind, [part for _, part in found]) for kind, found in groupby(kinds, key=lambda each: each[0])], spent
