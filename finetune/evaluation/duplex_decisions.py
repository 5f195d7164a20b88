"""Decisions of full-duplex records under teacher forcing: does the model listen, speak and yield when it should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.evaluation.batched_generation import device_of, evaluating
from finetune.model_folders.downsample_mode import working_in
from finetune.sample import Sample
from finetune.templates.duplex import LISTEN, SPEAK, TURN_END, generated_units

KINDS = ("listen", "yield", "start", "continue")
"""Kinds of decisions: listen, listen right after a turn, begin a turn, go on with one."""


class UnitDecision(NamedTuple):
    """One decision with the true past in front of it.

    Attributes:
        kind: one of KINDS, what the record does.
        right: whether the likeliest token is that of the record.
        margin: logit of the record's token minus that of the other of <|listen|> and <|speak|>.
        turn_end: whether <|turn_eos|> is the likeliest token where the record ends a turn and nowhere before in this
            unit; None in a unit that ends no turn.
    """

    kind: str
    right: bool
    margin: float
    turn_end: bool | None


def decisions_of(
    model: nn.Module, encoder: Encoder, samples: Sequence[Sample], batch_size: int = 8
) -> Iterator[list[UnitDecision]]:
    """The decisions of full-duplex records, each with the record's own units in front of it.

    Args:
        model: the model, or a PeftModel around it; its training mode is restored.
        encoder: that of the checkpoint.
        samples: samples with a timeline.
        batch_size: samples per forward pass.
    """
    for start in range(0, len(samples), batch_size):
        examples = [encoder.encode(sample) for sample in samples[start : start + batch_size]]
        batch = {name: value.to(device_of(model)) for name, value in pad(examples, encoder.pad_id).items()}
        labels = batch.pop("labels")
        with torch.no_grad(), evaluating(model), working_in(model, encoder.downsample_mode):
            logits = model(**batch).logits
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            yield _decisions(encoder, example.input_ids.tolist(), labels[row, :length].tolist(), logits[row, :length])


def _decisions(encoder: Encoder, ids: list[int], labels: list[int], logits: torch.Tensor) -> list[UnitDecision]:
    listen, speak, turn_end = map(encoder.prompt_tokenizer.control, (LISTEN, SPEAK, TURN_END))
    best = logits.argmax(-1).tolist()
    found = []
    for unit in generated_units(ids, labels, encoder.prompt_tokenizer):
        before = unit.first - 1  # a position predicts the next token
        own, other = (speak, listen) if unit.speaks else (listen, speak)
        margin = (logits[before, own] - logits[before, other]).item()
        kind = ("start" if unit.begins else "continue") if unit.speaks else "yield" if unit.yields else "listen"
        ended = None
        if unit.ends:
            said = best[before : before + len(unit.ids)]
            ended = turn_end in said and said.index(turn_end) == unit.ids.index(turn_end)
        found.append(UnitDecision(kind, best[before] == own, margin, ended))
    return found


def decision_scores(decisions: Sequence[UnitDecision]) -> dict[str, float]:
    """Accuracy over all decisions, accuracy and mean margin by kind, and accuracy of turn ends; of kinds that occur."""
    scores = {"decision_accuracy": _mean([each.right for each in decisions])}
    for kind in KINDS:
        own = [each for each in decisions if each.kind == kind]
        if own:
            scores[f"{kind}_accuracy"] = _mean([each.right for each in own])
            scores[f"{kind}_margin"] = _mean([each.margin for each in own])
    ends = [each.turn_end for each in decisions if each.turn_end is not None]
    return scores | ({"turn_end_accuracy": _mean(ends)} if ends else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
