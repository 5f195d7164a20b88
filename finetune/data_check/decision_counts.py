"""Decisions of full-duplex records: how often the model listens, speaks and yields, and seconds with too much text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from finetune.sample import DataError, SampleSet
from finetune.templates.duplex import MOST_TOKENS, GeneratedUnit, generated_units
from finetune.templates.prompt_types import PromptTokenizer, TokenizedPrompt

# Below this share of a kind of decision the report says that it is rare.
_RARE = 0.1

Decisions = tuple[int, int, int, int]
"""Number of units, of those that speak, of turns, and of units that listen right after a turn."""


def rendered_units(rendered: TokenizedPrompt, prompt_tokenizer: PromptTokenizer) -> list[GeneratedUnit]:
    """The units of a rendered full-duplex record."""
    return generated_units(rendered.input_ids, rendered.labels, prompt_tokenizer)


def counted(units: Sequence[GeneratedUnit]) -> Decisions:
    """The decisions of some units."""
    return (len(units), *(sum(getattr(unit, name) for unit in units) for name in ("speaks", "begins", "yields")))  # pyright: ignore[reportReturnType]


def too_many_tokens(units: Sequence[GeneratedUnit]) -> Iterator[str]:
    """A note about units that the published inference would cut."""
    if any(len(unit.ids) > MOST_TOKENS for unit in units):
        yield (
            f"a unit with more than {MOST_TOKENS} tokens, where the published inference stops; give word times that "
            "spread the text"
        )


def check_weighted(samples: SampleSet, weights: Mapping[str, float] | None) -> None:
    """Refuses weights of decisions for data that have none.

    Raises:
        DataError: no record is a full-duplex one.
    """
    if weights is not None and not samples.has_timelines:
        raise DataError(
            f"{samples.title}: none of its records is a full-duplex one, and --unit_loss_weights weighs their "
            "decisions: remove the flag, or give such records"
        )


def describe_decisions(decisions: Decisions, records: int) -> Iterator[str]:
    """Lines of the report: the decisions of all full-duplex records, and which kind is rare."""
    units, speaking, turns, yielding = decisions
    yield (
        f"full duplex: {records} records, {units} units (seconds) in all: {units - speaking} listen ({yielding} of "
        f"them right after a turn), {speaking} speak ({turns} turns)"
    )
    kinds = {"listening": units - speaking, "speaking": speaking, "listening right after a turn": yielding}
    rare = [f"{kind} ({100 * count / units:.1f} %)" for kind, count in kinds.items() if count < _RARE * units]
    if rare:
        remedy = "more records with them, or --unit_loss_weights, teach them better"
        yield f"full duplex: rare decisions: {' and '.join(rare)}; {remedy}"
