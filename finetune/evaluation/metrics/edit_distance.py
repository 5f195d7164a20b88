"""Edit-distance metrics with rapidfuzz: ANLS, ROUGE-L, character and word error rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

from finetune.evaluation.metrics.metric import Metric, best

_THRESHOLD = 0.5
# A word of letters and digits; of scripts written without spaces, each sign is one.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def anls(prediction: str, reference: str) -> float:
    """1 - edit distance / length of the longer text, or 0 below 0.5; case and white space at the ends do not count.

    Source: ANLS of ST-VQA (Biten et al., 2019, arXiv 1907.00490), threshold 0.5.
    """
    given, wanted = prediction.strip().lower(), reference.strip().lower()
    similarity = 1 - Levenshtein.normalized_distance(given, wanted)
    return similarity if similarity > _THRESHOLD else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in lower case; a Chinese or Japanese sign is a word.

    Source: ROUGE-L (Lin, 2004, aclanthology.org/W04-1013) with beta 1.
    """
    given, wanted = _TOKEN.findall(prediction.lower()), _TOKEN.findall(reference.lower())
    if not given or not wanted:
        return float(given == wanted)
    return 2 * LCSseq.similarity(given, wanted) / (len(given) + len(wanted))


def _rate(name: str, units: Callable[[str], Sequence[str]]) -> Metric:
    """Edits per unit of the reference; over a dataset, total edits per total units."""

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        given = units(prediction)
        counts = []
        for reference in references:
            wanted = units(reference)
            edits = Levenshtein.distance(given, wanted)
            # With an empty reference every unit is an insertion.
            counts.append((edits / max(len(wanted), 1), edits, len(wanted)))
        rate, edits, length = min(counts)
        return {name: rate, "edits": edits, "length": length}

    def combine(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        edits, length = (sum(score[key] for score in scores) for key in ("edits", "length"))
        return {name: edits / max(length, 1)}

    return Metric(name, score, higher=False, combine=combine)


def _characters(text: str) -> str:
    return " ".join(text.split())


ANLS = Metric("anls", best("anls", anls))
ROUGE_L = Metric("rouge_l", best("rouge_l", rouge_l))
# Character and word error rate: (substitutions + deletions + insertions) / units of the reference (Levenshtein, 1966;
# NIST's word error rate). White space counts as one blank; case and punctuation count. Lower is better.
CER = _rate("cer", _characters)
WER = _rate("wer", str.split)
