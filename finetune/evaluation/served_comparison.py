"""Compares a server with a local model on the same samples: prompts, first-token log probabilities, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.model_folders.downsample_mode import working_in
from finetune.sample import Sample


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """One prompt at a server and here.

    Attributes:
        index: position in the data file.
        prompt_tokens: number of tokens of the prompt at the server and here; None for what the server does not say.
        prompt_equal: whether the prompts are equal, by their ids if the server says them, else by their number; None
            where it says neither.
        ids_told: whether the server says the ids.
        first_token: largest difference of the log-probabilities of the server's likeliest first tokens; None without.
        answers_equal: whether the greedy answers are equal.
    """

    index: int
    prompt_tokens: tuple[int | None, int]
    prompt_equal: bool | None
    ids_told: bool
    first_token: float | None
    answers_equal: bool


def compare_sample(
    model: nn.Module, encoder: Encoder, index: int, prompt: Sample, told: Mapping[str, Any], answers: tuple[str, str]
) -> SampleComparison:
    """Compares one prompt.

    Args:
        model: the model here.
        encoder: its encoder.
        index: position in the data file.
        prompt: the conversation up to the question.
        told: what the server says (``ServedAnswer.as_json``); empty for nothing.
        answers: of the server and of the model.
    """
    example = encoder.encode(prompt, generate=True)
    ids, served_ids = example.input_ids.tolist(), told.get("prompt_ids")
    count = len(served_ids) if served_ids is not None else told.get("prompt_tokens")
    equal = ids == served_ids if served_ids is not None else None if count is None else count == len(ids)
    first = {int(token): value for token, value in (told.get("first") or {}).items()}
    difference = None
    if first:
        own = _first_logprobs(model, encoder, example)
        difference = max(abs(own[token].item() - value) for token, value in first.items())
    # Servers leave out a character of which the last token has only the first bytes.
    served, here = (answer.rstrip("\ufffd") for answer in answers)
    return SampleComparison(index, (count, len(ids)), equal, served_ids is not None, difference, served == here)


def _first_logprobs(model: nn.Module, encoder: Encoder, example: Any) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in pad([example], encoder.pad_id).items() if key != "labels"}
    with torch.no_grad(), working_in(model.eval(), encoder.downsample_mode):
        return model(**batch).logits[0, -1].float().log_softmax(-1).cpu()


def verdict(rows: Sequence[SampleComparison], tolerance: float) -> tuple[str, str]:
    """A status ("same", "prompts differ", "first tokens differ", "answers differ" or "unknown"), and the figures.

    Answers decide only where the server says nothing of its first tokens: near ties turn with rounding.
    """
    told = [row for row in rows if row.prompt_equal is not None]
    measured = [row.first_token for row in rows if row.first_token is not None]
    equal, alike = sum(bool(row.prompt_equal) for row in told), sum(row.answers_equal for row in rows)
    by = "ids" if told and all(row.ids_told for row in told) else "lengths"
    figures = [f"prompts {equal} of {len(told)} equal (by {by})" if told else "prompts not told"]
    figures.append(
        f"first token {max(measured):.1e} at most (tolerance {tolerance:g})" if measured else "first token not told"
    )
    figures.append(f"answers {alike} of {len(rows)} equal")
    status = "same"
    if equal < len(told):
        status = "prompts differ"
    elif measured and max(measured) > tolerance:
        status = "first tokens differ"
    elif not measured and alike < len(rows):
        status = "answers differ"
    elif not told and not measured:
        status = "unknown"
    return status, ", ".join(figures)
