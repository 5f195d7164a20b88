"""What a metric is."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.utils.errors import UserError

# Prediction and accepted answers to figures; the first figure is the score.
Score = Callable[[str, Sequence[str]], dict[str, float]]


_THOUGHT_ENDS = "</think>"


class MetricError(UserError):
    """A metric that is not there, or a function that gives no number."""


def mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every figure over all samples."""
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}


@dataclass(frozen=True, slots=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: of the metric and of its first figure.
        score: (prediction, accepted answers) to figures of one sample; the first is called like the metric.
        higher: whether more is better.
        combine: figures of all samples to those of the whole; the mean unless said otherwise.
    """

    name: str
    score: Score
    higher: bool = True
    combine: Callable[[Sequence[Mapping[str, float]]], dict[str, float]] = mean

    def figures(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """The score of what is answered: of an answer that begins with thinking, what stands behind it."""
        return dict(self.score(_answered(prediction), [_answered(reference) for reference in references]))

    def badness(self, score: Mapping[str, float]) -> float:
        """A sort key: the worst sample has the largest."""
        return -score[self.name] if self.higher else score[self.name]


def _answered(text: str) -> str:
    return text.rpartition(_THOUGHT_ENDS)[2].strip()


def best(name: str, function: Callable[[str, str], float]) -> Score:
    """The score of the reference that fits best, for rules that compare with one."""

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        return {name: max(float(function(prediction, reference)) for reference in references)}

    return score


def failed(name: str, error: BaseException) -> MetricError:
    """What a user's own code raised, with the place where it did."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}, line {last.lineno}"
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return MetricError(f"metric {name!r} failed at {place}: {type(error).__name__}: {message}; correct the function")


def own(name: str, function: Callable[[str, list[str]], Any]) -> Metric:
    """A metric of the user's function, which gives a number or a dictionary of numbers whose first is the score."""

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        try:
            value = function(prediction, list(references))
        except Exception as error:  # noqa: BLE001 - a function of the user's, which may raise anything
            raise failed(name, error) from error
        figures = dict(value) if isinstance(value, Mapping) else {name: value}
        numbers = all(isinstance(each, (bool, int, float)) and math.isfinite(each) for each in figures.values())
        if not figures or not numbers:
            raise MetricError(
                f"metric {name!r} gave {value!r} for {prediction!r} and {list(references)!r}; "
                "it must give a finite number or a dictionary of them"
            )
        first = next(iter(figures.values()))
        return {name: float(first), **{key: float(figure) for key, figure in figures.items()}}

    return Metric(name, score)
