"""What a model did with full-duplex records, as text that an interrupted evaluation goes on from, and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from finetune.encoding.encoder import Encoder
from finetune.evaluation.duplex_decisions import UnitDecision, decision_scores, decisions_of
from finetune.evaluation.duplex_generation import Played, play
from finetune.evaluation.duplex_scores import played_scores, units_of
from finetune.evaluation.predictions import MAIN
from finetune.sample import Sample

RESULT = f"{MAIN}_played"
"""Key of the result of the model in predictions.jsonl."""
BASE_RESULT = f"{RESULT}_base"
"""Key of that of the model it is compared with."""


@dataclass(frozen=True, slots=True)
class RecordResult:
    """What a model did with a record.

    Attributes:
        decisions: with the record's own past.
        played: when it played freely; None in the prompt o45_fc.
    """

    decisions: list[UnitDecision]
    played: Played | None

    def to_text(self) -> str:
        """The result as JSON."""
        played = None if self.played is None else asdict(self.played)
        return json.dumps({"decisions": self.decisions, "played": played}, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str) -> RecordResult:
        """The result of ``to_text``."""
        given = json.loads(text)
        played = None if given["played"] is None else Played(**given["played"])
        return cls([UnitDecision(*each) for each in given["decisions"]], played)

    @property
    def right(self) -> float:
        """Share of right decisions."""
        return sum(each.right for each in self.decisions) / max(len(self.decisions), 1)


def results_of(
    model: nn.Module, encoder: Encoder, samples: Sequence[Sample], max_new_tokens: int
) -> Iterator[RecordResult]:
    """The results of a batch of full-duplex records.

    Args:
        model: the model, or a PeftModel around it.
        encoder: that of the checkpoint.
        samples: samples with a timeline.
        max_new_tokens: tokens of a unit in free playing.
    """
    decisions = list(decisions_of(model, encoder, samples, len(samples)))
    native = encoder.layout.duplex == "native"
    played = play(model, encoder, samples, max_new_tokens=max_new_tokens) if native else [None] * len(samples)
    for one, other in zip(decisions, played, strict=True):
        yield RecordResult(one, other)


def scores_of(samples: Sequence[Sample], results: Sequence[RecordResult]) -> dict[str, float]:
    """The scores over records: those of decisions, and those of free playing where it was done."""
    scores = decision_scores([each for result in results for each in result.decisions])
    played = [(sample, each.played) for sample, each in zip(samples, results, strict=True) if each.played is not None]
    return scores | (played_scores(*map(list, zip(*played, strict=True))) if played else {})  # pyright: ignore[reportArgumentType]


def as_row(index: int, sample: Sample, result: RecordResult, base: RecordResult | None) -> dict[str, Any]:
    """A line of predictions.jsonl: what the model did in each second and what the record does, and all results."""
    row: dict[str, Any] = {"index": index, "id": sample.id}
    if result.played is not None:
        row |= {MAIN: result.played.text, "units": units_of(sample, result.played)}
    row[RESULT] = result.to_text()
    return row if base is None else {**row, BASE_RESULT: base.to_text()}
