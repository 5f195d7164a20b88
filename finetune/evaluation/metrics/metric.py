"""The Metric class: scores of one answer and their aggregation over a dataset."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.utils.errors import UserError

# (prediction, accepted answers) -> named values; the first is the score.
Score = Callable[[str, Sequence[str]], dict[str, float]]


_THOUGHT_ENDS = "</think>"


class MetricError(UserError):
    """Unknown metric, or a custom function that returns no number."""


def mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every value over all samples."""
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of answers.

    Attributes:
        name: name of the metric and of its first value.
        score: (prediction, accepted answers) -> values of one sample; the first has the name of the metric.
        higher: whether higher is better.
        combine: aggregation of the values of all samples; by default the mean.
    """

    name: str
    score: Score
    higher: bool = True
    combine: Callable[[Sequence[Mapping[str, float]]], dict[str, float]] = mean

    def figures(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """The values of an answer; a thinking block at its beginning is removed first."""
        return dict(self.score(_answered(prediction), [_answered(reference) for reference in references]))

    def sort_key(self, score: Mapping[str, float]) -> float:
        """Sort key: largest for the worst sample."""
        return -score[self.name] if self.higher else score[self.name]


def _answered(text: str) -> str:
    return text.rpartition(_THOUGHT_ENDS)[2].strip()


def best(name: str, function: Callable[[str, str], float]) -> Score:
    """Maximum over the references, for a metric that compares with one reference."""

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        return {name: max(float(function(prediction, reference)) for reference in references)}

    return score


def failed(name: str, error: BaseException) -> MetricError:
    """The error for an exception in user code, with its location."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}, line {last.lineno}"
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return MetricError(f"metric {name!r} failed at {place}: {type(error).__name__}: {message}; correct the function")


def own(name: str, function: Callable[[str, list[str]], Any]) -> Metric:
    """A metric from a custom function that returns a number, or a dictionary of numbers whose first is the score."""

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        try:
            value = function(prediction, list(references))
        except Exception as error:  # noqa: BLE001 - user code, which may raise anything
            raise failed(name, error) from error
        figures = dict(value) if isinstance(value, Mapping) else {name: value}
        numbers = all(isinstance(each, (bool, int, float)) and math.isfinite(each) for each in figures.values())
        if not figures or not numbers:
            raise MetricError(
                f"metric {name!r} gave {value!r} for {prediction!r} and {list(references)!r}; "
                "it must return a finite number or a dictionary of them"
            )
        first = next(iter(figures.values()))
        return {name: float(first), **{key: float(figure) for key, figure in figures.items()}}

    return Metric(name, score)
