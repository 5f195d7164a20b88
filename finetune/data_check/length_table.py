"""Token lengths of a data set for other values of model_max_length and max_slice_nums, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.encoding.encoder import Encoder
from finetune.sample import DataError, Sample
from finetune.templates.prompt_types import CachedPromptTokenizer

MEASURED = 300
"""Number of records that are measured, evenly spaced."""
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Candidates for model_max_length, besides the one in use."""
SLICES = (1, 2, 4, 6, 9)
"""Candidates for max_slice_nums, besides the one in use."""


@dataclass(frozen=True, slots=True)
class LengthTable:
    """Token lengths of some samples, before any ``LengthPolicy``.

    Attributes:
        limit: model_max_length in use; None for none.
        slices: max_slice_nums in use.
        tokens: (n,) lengths by max_slice_nums, in ascending order.
    """

    limit: int | None
    slices: int
    tokens: dict[int, np.ndarray]

    def __str__(self) -> str:
        return "\n".join(_table(self))


def measure_lengths(samples: Sequence[Sample], encoder: Encoder) -> LengthTable | None:
    """Token lengths of evenly spaced samples for every candidate of max_slice_nums; None if no sample can be used.

    Args:
        samples: the data set; bad samples are skipped.
        encoder: the encoder of the run.
    """
    own = encoder.slicing.max_slice_nums
    candidates = sorted({*SLICES, own}) if own else [0]
    rows = []
    for index in range(0, len(samples), max(-(-len(samples) // MEASURED), 1)):
        try:
            rows.append(_row(samples[index], encoder, candidates))
        except DataError:
            continue
    if not rows:
        return None
    columns = np.array(rows).T
    return LengthTable(encoder.max_length, own, dict(zip(candidates, columns, strict=True)))


def _row(sample: Sample, encoder: Encoder, candidates: Sequence[int]) -> list[int]:
    sizes, prompt_tokenizer = encoder.sizes(sample), CachedPromptTokenizer(encoder.prompt_tokenizer)
    row, known = [], {}
    for slices in candidates:
        plans = encoder.plans(sizes, slices or None)
        if plans not in known:
            known[plans] = len(encoder.render(sample, plans, prompt_tokenizer=prompt_tokenizer).input_ids)
        row.append(known[plans])
    return row


def _table(lengths: LengthTable) -> Iterator[str]:
    """Rows by max_slice_nums, columns by model_max_length; a cell is the share of samples that are longer."""
    own = lengths.tokens[lengths.slices]
    longest = max(map(np.max, lengths.tokens.values()))
    shown = [length for length in LENGTHS if own.min() / 2 < length]
    # Columns end at the first length that all samples fit into.
    enough = next((place for place, length in enumerate(shown) if length >= longest), len(shown) - 1)
    limits = sorted({*shown[: enough + 1], *([lengths.limit] if lengths.limit else [])})
    yield f"  tokens of {len(own)} records, skipped ones too; the last columns: the share longer than model_max_length"
    yield "  max_slice_nums   median     95 %  longest" + "".join(f"{limit:>9}" for limit in limits)
    alike = all(np.array_equal(own, tokens) for tokens in lengths.tokens.values())
    for slices, tokens in {lengths.slices: own}.items() if alike else lengths.tokens.items():
        middle, high = np.percentile(tokens, (50, 95))
        shares = "".join(f"{100 * np.mean(tokens > limit):>8.0f}%" for limit in limits)
        mark = "*" if slices == lengths.slices else " "
        yield f"  {slices or 'no slicing':>13}{mark} {middle:>8.0f} {high:>8.0f} {tokens.max():>8}{shares}"
    others = ", and no other max_slice_nums changes a length" if alike and lengths.slices else ""
    yield f"  * in use, with model_max_length {lengths.limit}{others}"
