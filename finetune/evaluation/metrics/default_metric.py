"""Automatic choice of a metric from the format of the references (--metric auto)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from finetune.evaluation.metrics.boxes import boxes
from finetune.evaluation.metrics.json_fields import parse
from finetune.evaluation.metrics.text import number

_PEOPLE = 10
_SHORT = 5
_LETTERS = "ABCDEFGHIJ"


def choose(references: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Name of the metric for the accepted answers of all samples, and the reason.

    The first rule that holds for every sample applies: ten answers each (vqa); several (anls); boxes (box_iou); JSON
    objects or arrays (json_f1); option letters (choice); numbers (relaxed). Else it is normalised where half the
    answers have at most 5 words, and rouge_l where they are longer.
    """
    if all(len(answers) >= _PEOPLE for answers in references):
        return "vqa", "every sample has ten answers or more"
    if all(len(answers) > 1 for answers in references):
        return "anls", "every sample has several answers"
    every = [answer.strip() for answers in references for answer in answers]
    if all(boxes(answer) for answer in every):
        return "box_iou", "every reference has a <box>"
    if all(_is_json(answer) for answer in every):
        return "json_f1", "every reference is JSON"
    if all(answer.strip("().") in _LETTERS and len(answer.strip("().")) == 1 for answer in every):
        return "choice", "every reference is an option letter"
    if all(number(answer) is not None for answer in every):
        return "relaxed", "every reference is a number"
    words = median(len(answer.split()) for answer in every)
    signs = median(len(answer) for answer in every)
    # Languages written without spaces have few words at any length.
    if words <= _SHORT and signs <= 8 * _SHORT:
        return "normalised", f"short references (median {words:g} words)"
    return "rouge_l", f"long references (median {words:g} words)"


def _is_json(text: str) -> bool:
    if text[:1] not in ("{", "["):
        return False
    try:
        parse(text)
    except ValueError:
        return False
    return True
