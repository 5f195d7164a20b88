"""Weights of decisions in the loss of full-duplex records: listen, speak, and listen right after an own turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.templates.duplex import generated_units
from finetune.templates.prompt_types import PromptTokenizer

WEIGHTED = ("listen", "speak", "yield")
"""The decisions; "yield" is a listen right after the model has ended a turn."""


def decision_weights(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PromptTokenizer, weights: Mapping[str, float]
) -> list[float]:
    """The weight of every token of a rendered full-duplex record: 1, but for the decisions.

    Args:
        ids: token ids, in either prompt.
        labels: labels.
        tokenizer: as the templates see it (``PromptTokenizer``).
        weights: by name, of WEIGHTED; 1 for a name that is missing.
    """
    found = [1.0] * len(ids)
    for unit in generated_units(ids, labels, tokenizer):
        found[unit.first] = weights.get("speak" if unit.speaks else "yield" if unit.yields else "listen", 1.0)
    return found
