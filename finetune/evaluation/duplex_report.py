"""report.html of ``evaluate`` for full-duplex records: scores, and every second of the worst records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.evaluation.duplex_results import RecordResult
from finetune.evaluation.duplex_scores import units_of
from finetune.pages.html_page import count, render
from finetune.sample import Sample

_DOES = {"listen": "listens", "yield": "listens after a turn", "start": "begins a turn", "continue": "goes on"}


def build_duplex(
    samples: Sequence[Sample],
    results: Sequence[RecordResult],
    scores: Mapping[str, float],
    base: Mapping[str, float],
    facts: Mapping[str, str],
    *,
    title: str,
    most: int,
) -> str:
    """The page as HTML; every text of the data and of the model is escaped.

    Args:
        samples: samples with a timeline.
        results: of the model, one per sample.
        scores: of the model.
        base: of the model it is compared with; empty without one.
        facts: what is shown at the top beside the scores.
        title: name of the data.
        most: maximum number of records shown, those with the fewest right decisions first.
    """
    order = sorted(range(len(samples)), key=lambda index: (results[index].right, index))[:most]
    return render(
        "duplex_evaluation",
        title=f"{count(len(samples), 'full-duplex record')} of {title}",
        total=len(samples),
        scores=[(name.replace("_", " "), value, base.get(name)) for name, value in scores.items()],
        compared=bool(base),
        facts=[(name.replace("_", " ").capitalize(), value) for name, value in facts.items() if value],
        cards=[_card(samples[index], results[index]) for index in order],
    )


def _card(sample: Sample, result: RecordResult) -> dict[str, Any]:
    return {
        "id": sample.id,
        "source": str(sample.source),
        "right": result.right,
        "seconds": list(_seconds(sample, result)),
        "played": result.played is not None,
    }


def _seconds(sample: Sample, result: RecordResult) -> Iterator[dict[str, Any]]:
    played = units_of(sample, result.played) if result.played is not None else [{}] * len(result.decisions)
    for decision, unit in zip(result.decisions, played, strict=True):
        yield {
            "kind": "speak" if decision.kind in ("start", "continue") else "listen",
            "does": _DOES[decision.kind],
            "right": decision.right,
            "margin": decision.margin,
            "reference": unit.get("reference") or "",
            "speaks": unit.get("speaks", False),
            "text": unit.get("text") or "",
        }
