"""Duplicate records: same text and media, within a dataset or across datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data_check.sample_hash import Place, duplicate_groups
from finetune.pages.record_survey import CheckedDataset

_LETTERS = 200


@dataclass(frozen=True, slots=True)
class Repeated:
    """A group of duplicate records.

    Attributes:
        places: dataset and record number of each.
        across: whether they are in several datasets.
        text: beginning of their first question, or of what the model says where nobody asks.
    """

    places: tuple[str, ...]
    across: bool
    text: str


def find(datasets: Sequence[CheckedDataset]) -> list[Repeated]:
    """Groups of records that are alike, those of several data sets first, then the largest."""
    groups = duplicate_groups([(part.records, part.report.content_keys) for part in datasets])
    return sorted(
        (_repeated(datasets, group) for group in groups), key=lambda each: (not each.across, -len(each.places))
    )


def _repeated(datasets: Sequence[CheckedDataset], group: Sequence[Place]) -> Repeated:
    samples = [datasets[part].records[index] for part, index in group]
    asked = [message.text for message in samples[0].messages if message.role == "user"]
    timeline = samples[0].timeline
    said = (
        [message.text for message in samples[0].messages]
        if timeline is None
        else [turn.text for turn in timeline.turns]
    )
    text = next((text for text in (*asked, *said) if text.strip()), "no text")
    across = len({part for part, _ in group}) > 1
    return Repeated(tuple(str(each.source) for each in samples), across, text.strip()[:_LETTERS])
