"""VQA accuracy: agreement with ten human answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.evaluation.metrics.metric import Metric

_ENOUGH = 3
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# Written without the apostrophe they mean the same; words that are other words without it (we're, he'll) are excluded.
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm i've "
    "isn't it'd it'll let's ma'am might've must've mustn't needn't oughtn't she's should've shouldn't somebody'd "
    "someone's that's there'd there's they'd they'll they're they've wasn't we've weren't what'll what's when's "
    "where's who'd who'll who's why's won't would've wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def normalise(text: str) -> str:
    """Answer normalisation of VQA.

    Lower case; punctuation goes (beside a space, or in a text with a comma between digits) or becomes a space; full
    stops go unless they belong to a number; number words become digits; articles go; contractions get their apostrophe.
    """
    text = " ".join(text.lower().split())
    numeric = _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        text = text.replace(sign, "" if beside_space or numeric else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa(prediction: str, references: Sequence[str]) -> float:
    """Mean over all leave-one-out sets of the human answers of min(1, agreeing answers / 3).

    With fewer than four answers (a set without one would be smaller than three) it is 1 when any agrees, else 0.
    Source: VQA (Antol et al., 2015, arXiv 1505.00468) and the evaluation published with it.
    """
    given = normalise(prediction)
    agrees = [normalise(reference) == given for reference in references]
    if len(agrees) <= _ENOUGH:
        return float(any(agrees))
    return sum(min(1.0, (sum(agrees) - agree) / _ENOUGH) for agree in agrees) / len(agrees)


VQA = Metric("vqa", lambda prediction, references: {"vqa": vqa(prediction, references)})
