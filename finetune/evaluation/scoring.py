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
class UnscoredRow:
    """An answer that is not scored.

    Attributes:
        index: position in the data file.
        prompt: the conversation up to the question.
        prediction: the model's answer.
        compared: answer of the model it is compared with, None without a comparison.
    """

    index: int
    prompt: Sample
    prediction: str
    compared: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The line of predictions.jsonl."""
        question = self.prompt.messages[-1].text
        line = {"index": self.index, "id": self.prompt.id, "question": question, MAIN: self.prediction}
        return line if self.compared is None else {**line, BASE: self.compared}


@dataclass(slots=True)
class ScoreRow:
    """One evaluated sample.

    Attributes:
        index: position in the data file.
        prompt: the conversation up to the question.
        references: accepted answers.
        prediction: the model's answer.
        scores: values of the metric; the first is the score.
        compared: answer of the model it is compared with, None without a comparison.
        compared_scores: its scores.
    """

    index: int
    prompt: Sample
    references: list[str]
    prediction: str
    scores: dict[str, float]
    compared: str | None = None
    compared_scores: dict[str, float] = field(default_factory=dict)

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
        return line if self.compared is None else {**line, BASE: self.compared, "scores_base": self.compared_scores}


def make_rows(
    metric: Metric,
    samples: Mapping[int, tuple[Sample, list[str]]],
    predictions: Sequence[str],
    compared: Sequence[str] | None = None,
) -> list[ScoreRow]:
    """A row for every sample: (prompt, references) by position, the answers in the same order."""
    rows = []
    for number, (index, (prompt, references)) in enumerate(samples.items()):
        row = ScoreRow(index, prompt, references, predictions[number], metric.figures(predictions[number], references))
        if compared is not None:
            row.compared, row.compared_scores = compared[number], metric.figures(compared[number], references)
        rows.append(row)
    return rows


def summarise(metric: Metric, rows: Sequence[ScoreRow]) -> dict[str, Any]:
    """Scores over all rows and, of a comparison, those of the other model and how many answers got better and worse."""
    summary: dict[str, Any] = {
        "metric": metric.name,
        "higher_is_better": metric.higher,
        "samples": len(rows),
        "scores": metric.combine([row.scores for row in rows]),
    }
    if rows[0].compared is not None:
        changes = [change(metric, row) for row in rows]
        summary["base"] = metric.combine([row.compared_scores for row in rows])
        summary["better"] = sum(value > 0 for value in changes)
        summary["worse"] = sum(value < 0 for value in changes)
        summary["other_answer"] = sum(row.prediction != row.compared for row in rows)
    return summary


def change(metric: Metric, row: ScoreRow) -> float:
    """Improvement over the compared model; negative when worse, 0 without a comparison."""
    return metric.sort_key(row.compared_scores) - metric.sort_key(row.scores) if row.compared is not None else 0.0
