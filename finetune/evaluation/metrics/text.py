"""Metrics for short answers: exact match, token F1, relaxed accuracy, multiple choice."""

from __future__ import annotations

import re
import string
from collections import Counter

from finetune.evaluation.metrics.metric import Metric, best

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TOLERANCE = 0.05


def exact(prediction: str, reference: str) -> float:
    """1 when both texts are equal after stripping white space at the ends."""
    return float(prediction.strip() == reference.strip())


def normalise(text: str) -> str:
    """Text for comparing: lower case, no ASCII punctuation, no English article, single spaces.

    Source: the answer normalisation of SQuAD (Rajpurkar et al., 2016, arXiv 1606.05250).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def normalised(prediction: str, reference: str) -> float:
    """1 when both are the same after ``normalise``."""
    return float(normalise(prediction) == normalise(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of common words, counted with repetition, after ``normalise``.

    Without words on either side it is 1 when neither has any, else 0. A language written without spaces counts as one
    word. Source: SQuAD (Rajpurkar et al., 2016, arXiv 1606.05250).
    """
    given, wanted = normalise(prediction).split(), normalise(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def number(text: str) -> float | None:
    """Parses a number, with "12 %" as 0.12; None when the text is not a number."""
    text = text.strip()
    percent = text.endswith("%")
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        return None
    return value / 100 if percent else value


def relaxed(prediction: str, reference: str) -> float:
    """1 for a number within 5 % of the reference; other texts, and a reference of 0, must be equal but for case.

    Source: relaxed accuracy of PlotQA and ChartQA (Masry et al., 2022, arXiv 2203.10244).
    """
    given, wanted = number(prediction), number(reference)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= _TOLERANCE)
    return float(prediction.strip().lower() == reference.strip().lower())


_SAID = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*:?\s*\(?([A-Z])\b\)?", re.IGNORECASE)
_FIRST = re.compile(r"\(?([A-Za-z])(?:[).:,]|\s*$)")
_ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")


def option(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question chooses, in upper case; None when that is unclear.

    In this order: the letter it begins with ("B", "(b)", "B. cat"), the letter after "answer is" or "option", the only
    capital letter that stands alone in it.
    """
    text = text.strip()
    if found := _FIRST.match(text) or _SAID.search(text):
        return found[1].upper()
    letters = set(_ALONE.findall(text))
    return letters.pop() if len(letters) == 1 else None


def choice(prediction: str, reference: str) -> float:
    """1 when the chosen letter is that of the reference; the letter is found by the rules of ``option``."""
    wanted = option(reference)
    return float(wanted is not None and option(prediction) == wanted)


EXACT = Metric("exact", best("exact", exact))
NORMALISED = Metric("normalised", best("normalised", normalised))
TOKEN_F1 = Metric("token_f1", best("token_f1", token_f1))
RELAXED = Metric("relaxed", best("relaxed", relaxed))
CHOICE = Metric("choice", best("choice", choice))
