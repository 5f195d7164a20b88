"""Native full-duplex prompt of MiniCPM-o 4.5, one unit per second as published inference has it (o45_fc: duplex_fc.py).

``generated_units`` reads units of either prompt back from ids and labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.sample import Media, Message, Sample, Text
from finetune.templates.duplex_fc import SPOKEN_SLOT, render_prepared
from finetune.templates.placeholders import new_schema
from finetune.templates.prompt_types import IGNORE, PromptLayout, PromptTokenizer, TokenizedPrompt
from finetune.timeline import SpokenTurn, Timeline

LISTEN, SPEAK, TURN_END, UNIT_END = "<|listen|>", "<|speak|>", "<|turn_eos|>", "<|chunk_eos|>"
UNIT = ("<unit>", "</unit>")
TOKENS = (*UNIT, LISTEN, SPEAK, TURN_END, UNIT_END)
"""The control tokens of a unit."""
MOST_TOKENS = 20
"""Tokens of a unit, control tokens included, at which published inference stops (max_new_speak_tokens_per_chunk)."""
DEFAULT_SYSTEM = "Streaming Duplex Conversation! You are a helpful assistant."
"""System text of the published example (README of MiniCPM-o 4.5), for records without one."""


def render_timeline(
    sample: Sample, plans: Sequence[SlicePlan | AudioPlan], tokenizer: PromptTokenizer, layout: PromptLayout
) -> TokenizedPrompt:
    """The system turn, then per second <unit>, pictures, the second of user audio, what the model generates, </unit>.

    Or the prompt o45_fc, by the layout (``duplex_fc``).

    It generates <|listen|>, or <|speak|>, the text of the unit, <|turn_eos|> at the end of a turn, and <|chunk_eos|>:
    the tokens with labels. A second inside of a turn without a word is <|speak|><|chunk_eos|>: the
    published decoding does not listen before a turn has ended. The text of a turn is tokenized as a whole; a token
    belongs to the unit of its first character. Reference audio stands between <|audio_start|> and <|audio_end|>, user
    audio between no tokens.

    Args:
        sample: a sample with a timeline.
        plans: slice plan of every picture, placeholders of every audio clip, in reading order; the user audio has one
            run per second.
        tokenizer: as the templates see it (``PromptTokenizer``).
        layout: prompt layout, without image numbers.
    """
    assert sample.timeline is not None
    if layout.duplex == "o45_fc":
        return render_prepared(sample, [plan for plan in plans if isinstance(plan, AudioPlan)])
    rendered = TokenizedPrompt()
    left = iter(plans)
    _system(rendered, sample.messages[0], left, tokenizer, layout)
    *pictures, heard = left
    assert isinstance(heard, AudioPlan)
    said = generated_ids(sample.timeline, len(heard.runs), tokenizer)
    for unit, (run, ids) in enumerate(zip(heard.runs, said, strict=True)):
        rendered.add([tokenizer.control(UNIT[0])])
        for number, plan in enumerate(pictures):
            if sample.timeline.picture_units[number] == unit:
                assert isinstance(plan, SlicePlan)
                rendered.add_items(*new_schema(plan, number, layout, tokenizer))
        rendered.add_run(run, tokenizer.control(layout.placeholder))
        rendered.add(ids, train=True)
        rendered.add([tokenizer.control(UNIT[1])])
    return rendered


def _system(
    rendered: TokenizedPrompt,
    first: Message,
    plans: Iterator[SlicePlan | AudioPlan],
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
) -> None:
    parts = first.parts if first.role == "system" else ()
    text = "".join(part.text for part in parts if isinstance(part, Text)) or DEFAULT_SYSTEM
    reference = any(isinstance(part, Media) for part in parts)
    rendered.add([tokenizer.control("<|im_start|>"), *tokenizer.text(f"system\n{text}" + ("\n" if reference else ""))])
    if reference:
        plan = next(plans)
        assert isinstance(plan, AudioPlan)
        rendered.add([tokenizer.control("<|audio_start|>")])
        for run in plan.runs:
            rendered.add_run(run, tokenizer.control(layout.placeholder))
        rendered.add([tokenizer.control("<|audio_end|>")])
    rendered.add([tokenizer.control("<|im_end|>")])


def generated_ids(timeline: Timeline, units: int, tokenizer: PromptTokenizer) -> list[list[int]]:
    """The ids that the model generates in each of a number of units."""
    listen, speak, turn_end, unit_end = map(tokenizer.control, (LISTEN, SPEAK, TURN_END, UNIT_END))
    found = [[listen] for _ in range(units)]
    for turn in timeline.turns:
        ids = text_ids(turn, tokenizer)
        for unit in range(turn.first_unit, turn.last_unit + 1):
            end = [turn_end] if unit == turn.last_unit else []
            found[unit] = [speak, *ids.get(unit, []), *end, unit_end]
    return found


def text_ids(turn: SpokenTurn, tokenizer: PromptTokenizer) -> dict[int, list[int]]:
    """The ids of a turn's text by the unit of their first character."""
    starts = turn.starts()
    ids: dict[int, list[int]] = {}
    place = 0
    for token, (first, _) in zip(*tokenizer.spans(turn.text), strict=True):
        while place + 1 < len(starts) and starts[place + 1][0] <= first:
            place += 1
        ids.setdefault(starts[place][1], []).append(token)
    return ids


class GeneratedUnit(NamedTuple):
    """One unit of a rendered full-duplex record.

    Attributes:
        first: position of its decision, <|listen|> or <|speak|>.
        ids: decision, text and end marks: what the model generates.
        speaks: whether it speaks.
        begins: whether a turn begins in it.
        ends: whether a turn ends in it.
        yields: whether it listens right after a turn has ended.
    """

    first: int
    ids: tuple[int, ...]
    speaks: bool
    begins: bool = False
    ends: bool = False
    yields: bool = False


def generated_units(ids: Sequence[int], labels: Sequence[int], tokenizer: PromptTokenizer) -> list[GeneratedUnit]:
    """The units of a rendered full-duplex record in either prompt, from its ids and labels."""
    speak, turn_end, close = map(tokenizer.control, (SPEAK, TURN_END, UNIT[1]))
    in_slots = SPOKEN_SLOT[0] in ids
    close = SPOKEN_SLOT[1] if in_slots else close
    found: list[GeneratedUnit] = []
    first, speaking = None, False
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if first is None and label != IGNORE and (not in_slots or ids[position - 1] == SPOKEN_SLOT[0]):
            first = position
        elif first is not None and token == close:
            generated = tuple(ids[first:position])
            speaks, ends = generated[0] == speak, turn_end in generated
            after_turn = bool(found) and found[-1].ends
            found.append(
                GeneratedUnit(first, generated, speaks, speaks and not speaking, ends, not speaks and after_turn)
            )
            first, speaking = None, speaks and not ends
    return found
