"""Scores of predictions: a row per sample, and a summary over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.evaluation.metrics import Metric
from finetune.evaluation.predictions import MAIN
from finetune.sample import Sample

BASE = f"{MAIN}_base"


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer that is not scored.

    Attributes:
        index: position in the data file.
        prompt: the conversation up to the question.
        prediction: the model's answer.
        base: answer of the model it is compared with, None without a comparison.
    """

    index: int
    prompt: Sample
    prediction: str
    base: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The line of predictions.jsonl."""
        question = self.prompt.messages[-1].text
        line = {"index": self.index, "id": self.prompt.id, "question": question, MAIN: self.prediction}
        return line if self.base is None else {**line, BASE: self.base}


@dataclass(slots=True)
class ScoreRow:
    """One evaluated sample.

    Attributes:
        index: position in the data file.
        prompt: the conversation up to the question.
        references: accepted answers.
        prediction: the model's answer.
        scores: values of the metric; the first is the score.
        base: answer of the model it is compared with, None without a comparison.
        base_scores: its scores.
    """

    index: int
    prompt: Sample
    references: list[str]
    prediction: str
    scores: dict[str, float]
    base: str | None = None
    base_scores: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The line of predictions.jsonl."""
        line = {
            "index": self.index,
            "id": self.prompt.id,
            "question": self.prompt.messages[-1].text,
            "references": self.references,
            MAIN: self.prediction,
            "scores": self.scores,
        }
        return line if self.base is None else {**line, BASE: self.base, "scores_base": self.base_scores}


def make_rows(
    metric: Metric,
    samples: Mapping[int, tuple[Sample, list[str]]],
    predictions: Sequence[str],
    base: Sequence[str] | None = None,
) -> list[ScoreRow]:
    """A row for every sample: (prompt, references) by position, the answers in the same order."""
    rows = []
    for number, (index, (prompt, references)) in enumerate(samples.items()):
        row = ScoreRow(index, prompt, references, predictions[number], metric.figures(predictions[number], references))
        if base is not None:
            row.base, row.base_scores = base[number], metric.figures(base[number], references)
        rows.append(row)
    return rows


def summarise(metric: Metric, rows: Sequence[ScoreRow]) -> dict[str, Any]:
    """Scores over all rows and, of a comparison, those of the base and how many answers got better and worse."""
    summary: dict[str, Any] = {
        "metric": metric.name,
        "higher_is_better": metric.higher,
        "samples": len(rows),
        "scores": metric.combine([row.scores for row in rows]),
    }
    if rows[0].base is not None:
        changes = [change(metric, row) for row in rows]
        summary["base"] = metric.combine([row.base_scores for row in rows])
        summary["better"] = sum(value > 0 for value in changes)
        summary["worse"] = sum(value < 0 for value in changes)
        summary["other_answer"] = sum(row.prediction != row.base for row in rows)
    return summary


def change(metric: Metric, row: ScoreRow) -> float:
    """Improvement over the base; negative when worse, 0 without a comparison."""
    return metric.sort_key(row.base_scores) - metric.sort_key(row.scores) if row.base is not None else 0.0
