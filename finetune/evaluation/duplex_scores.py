"""Scores of full-duplex records that were played freely: when each turn began, and what was said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.evaluation.duplex_generation import Played
from finetune.evaluation.metrics.edit_distance import CER
from finetune.sample import Sample


def played_scores(samples: Sequence[Sample], played: Sequence[Played]) -> dict[str, float]:
    """Scores over records that were played.

    Returns:
        "turns_begun": share of the records' turns for which the model began to speak between the end of the turn before
        and the beginning of the next one; "delay_units": mean of how many units later than the record it began, of
        those turns (negative: too early); "extra_turns": turns of the model beyond one per turn of the record, by
        records; "cer": edits per character of the records' text.
    """
    delays: list[int] = []
    wanted = extra = 0
    texts = []
    for sample, one in zip(samples, played, strict=True):
        assert sample.timeline is not None
        turns = sample.timeline.turns
        wanted += len(turns)
        begun = begins(one)
        found = 0
        for number, turn in enumerate(turns):
            first = 0 if number == 0 else turns[number - 1].last_unit + 1
            end = len(one.units) if number + 1 == len(turns) else turns[number + 1].first_unit
            if starts := [unit for unit in begun if first <= unit < end]:
                delays.append(starts[0] - turn.first_unit)
                found += 1
        extra += len(begun) - found
        texts.append(CER.score(one.text, ["".join(turn.text for turn in turns)]))
    scores = {"turns_begun": len(delays) / wanted} if wanted else {}
    scores |= {"delay_units": sum(delays) / len(delays)} if delays else {}
    return {**scores, "extra_turns": extra / max(len(samples), 1), **CER.combine(texts)}


def begins(played: Played) -> list[int]:
    """The units in which the model began a turn."""
    found, going_on = [], False
    for unit, (ids, ends) in enumerate(zip(played.units, played.ends, strict=True)):
        speaks = len(ids) > 1  # <|listen|> stands alone
        if speaks and not going_on:
            found.append(unit)
        going_on = speaks and not ends
    return found


def units_of(sample: Sample, played: Played) -> list[dict[str, Any]]:
    """Per second what the model did, and under "reference" the text of the record; None where the record listens."""
    assert sample.timeline is not None
    wanted: dict[int, str] = {}
    for turn in sample.timeline.turns:
        wanted |= dict.fromkeys(range(turn.first_unit, turn.last_unit + 1), "") | turn.texts()
    return [
        {"speaks": len(ids) > 1, "text": text, "ends_turn": ends, "reference": wanted.get(unit)}
        for unit, (ids, text, ends) in enumerate(zip(played.units, played.texts, played.ends, strict=True))
    ]
