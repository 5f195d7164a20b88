"""Compact per-record statistics of a data check, and the choice of records for the preview page."""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, repeat

from finetune.data_check.check_cache import CachedCheck
from finetune.data_check.check_report import CheckReport, is_warning
from finetune.data_check.length_table import LengthTable
from finetune.encoding.length_policy import OUTCOMES, LengthPolicy
from finetune.media import image
from finetune.sample import DataError, Sample, SampleSet, as_sample_set

_KEPT = 3
"""Maximum number of records kept per kind."""
_EXTREMES = 3
_MEASURED = 1_000
"""Number of records whose image sizes are shown."""


@dataclass(slots=True)
class RecordSurvey:
    """Statistics of the records of one dataset; pass ``update`` to ``check`` as its callback.

    Attributes:
        indices: indices of the valid records.
        tokens: length of each in tokens.
        trained: number of tokens with loss of each.
        items: number of thumbnails, slices and frames of each.
        noted: the first few records with each warning, and with each outcome but "kept".
        kinds: the first record with each combination of media, as text.
    """

    indices: array[int] = field(default_factory=lambda: array("L"))
    tokens: array[int] = field(default_factory=lambda: array("L"))
    trained: array[int] = field(default_factory=lambda: array("L"))
    items: array[int] = field(default_factory=lambda: array("L"))
    noted: dict[str, list[int]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    def update(self, index: int, result: CachedCheck | DataError) -> None:
        """Records the result of a record."""
        if isinstance(result, DataError):
            return
        for column, value in zip(
            (self.indices, self.tokens, self.trained, self.items),
            (index, result.tokens, result.trained, result.items),
            strict=True,
        ):
            column.append(value)
        for word in (*filter(is_warning, result.notes), *([] if result.outcome == OUTCOMES[0] else [result.outcome])):
            found = self.noted.setdefault(word, [])
            if len(found) < _KEPT and index not in found:
                found.append(index)
        self.kinds.setdefault(_media_words(result.media), index)


@dataclass(frozen=True)
class CheckedDataset:
    """A checked dataset.

    Attributes:
        samples: the data set.
        length_policy: the encoder of the run and its policy for long samples.
        report: what the check found.
        survey: what it saw on the way.
        lengths: of some samples at other settings.
    """

    samples: Sequence[Sample]
    length_policy: LengthPolicy
    report: CheckReport
    survey: RecordSurvey
    lengths: LengthTable | None = None

    @cached_property
    def records(self) -> SampleSet:
        """The records as the check numbers them."""
        return as_sample_set(self.samples).unique

    def form(self, index: int) -> str:
        """The name of the form that a record has; empty where the data have none."""
        return self.records.format_of(index)


Chosen = Mapping[tuple[int, int], list[str]]
"""Reasons why each record is shown, by dataset index and record index."""


def choose(datasets: Sequence[CheckedDataset], most: int, seed: int) -> Chosen:
    """At most ``most`` records: first of each kind, those with warnings, extremes, and random ones for the rest."""
    chosen: dict[tuple[int, int], list[str]] = {}
    for part, index, reason in _wanted(datasets):
        if (part, index) in chosen or len(chosen) < most:
            reasons = chosen.setdefault((part, index), [])
            if reason not in reasons:
                reasons.append(reason)
    left = [(part, each) for part, found in enumerate(datasets) for each in found.survey.indices]
    draw = random.Random(seed)
    for key in draw.sample(left, min(len(left), most)):
        if len(chosen) >= most:
            break
        chosen.setdefault(key, ["random"])
    return dict(sorted(chosen.items()))


def _wanted(datasets: Sequence[CheckedDataset]) -> Iterator[tuple[int, int, str]]:
    """Records to show, most important first; rare kinds come before further ones of a frequent kind."""
    for part, found in enumerate(datasets):
        yield from ((part, index, reason) for index, reason in _firsts(found))
    for rank in range(_KEPT):
        for part, found in enumerate(datasets):
            for word, indices in found.survey.noted.items():
                if rank < len(indices):
                    yield part, indices[rank], word if word in OUTCOMES else "warning"
    for part, found in enumerate(datasets):
        for words, index in found.survey.kinds.items():
            yield part, index, f"first with {words}"
    extremes = [(part, *each) for part, found in enumerate(datasets) for each in _extremes(found.survey)]
    for rank in range(_EXTREMES):
        yield from ((part, order[rank], reason) for part, order, reason in extremes if rank < len(order))


def _firsts(found: CheckedDataset) -> Iterator[tuple[int, str]]:
    forms: dict[str, int] = {}
    for index in found.survey.indices:
        forms.setdefault(found.form(index), index)
    for form, index in forms.items():
        yield index, f"first in the form {form}" if form else "first"


def _extremes(survey: RecordSurvey) -> Iterator[tuple[list[int], str]]:
    """The records with the largest values, in order."""
    for values, reason in (
        (survey.tokens, "longest"),
        (survey.items, "most slices"),
        (survey.trained, "longest answers"),
    ):
        order = heapq.nlargest(_EXTREMES, range(len(values)), key=values.__getitem__)
        yield [survey.indices[place] for place in order if values[place]], reason


def image_sides(datasets: Sequence[CheckedDataset]) -> list[int]:
    """The longer side in pixels of every image of about 1000 evenly spaced records, or of all where there are fewer."""
    places = chain.from_iterable(zip(repeat(found), found.survey.indices) for found in datasets)
    step = max(sum(len(found.survey.indices) for found in datasets) // _MEASURED, 1)
    sides = []
    for found, index in islice(places, 0, None, step):
        try:
            sample = found.records[index]
            most = found.length_policy.encoder.refuse_above_pixels
            sides += [max(image.size(each, most)) for each in sample.media("image")]
        except DataError:
            continue  # changed since the check, which reports such records
    return sides


def _media_words(media: tuple[int, int, int]) -> str:
    """Which media a record has: "text only", "an image", "images and audio"."""
    names = (("an image", "images"), ("a video", "videos"), ("audio", "audio"))
    words = [pair[number > 1] for number, pair in zip(media, names, strict=True) if number]
    return " and ".join(words) or "text only"
