"""Generation from left-padded batches of prompts, encoded exactly as in training.

``prompt_batch``, ``generate_ids`` and ``answer_text`` serve evaluation (``answer_batch``: greedy, the figures are
reproducible) and chat (``finetune.chat.pipeline``: sampling, and answers as a stream) alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.model_folders.downsample_mode import working_in
from finetune.sample import DataError, Sample


def split_answer(sample: Sample) -> tuple[Sample, str]:
    """A sample without its last turn, and the text of that turn.

    Raises:
        DataError: the last turn is not the assistant's, it calls tools, or it is the only turn; a full-duplex record.
    """
    if sample.timeline is not None:
        raise DataError(
            f"{sample.source}: is a full-duplex record, which has no question to answer; python -m finetune evaluate "
            "scores such records in a file of their own"
        )
    *before, last = sample.messages
    if last.role != "assistant" or not before:
        raise DataError(
            f"{sample.source}: the last turn is a {last.role} turn; the last turn must be the reference answer "
            "(evaluate --predict_only needs none)"
        )
    if last.calls:
        raise DataError(
            f"{sample.source}: the last turn calls tools, which is no text to compare answers with; end the "
            "record with a text answer, or remove it"
        )
    return replace(sample, messages=tuple(before), rejected=None), last.text


def batches_by_length(encoder: Encoder, prompts: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Prompt indices in batches, longest first: little padding, and out-of-memory errors come at the start."""
    order = sorted(range(len(prompts)), key=lambda index: -encoder.measure(prompts[index], generate=True).tokens)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int = 64,
    synced: bool = False,
) -> list[str]:
    """Greedy answers to conversations that end with a user turn, from one left-padded batch.

    Args:
        model: the model, or a PeftModel around it; its training mode is restored.
        tokenizer: that of the checkpoint.
        encoder: that of the checkpoint.
        prompts: at least one.
        max_new_tokens: maximum number of tokens per answer.
        synced: continue until every rank has finished, as ZeRO-3 requires; every rank must then call this.
    """
    batch = prompt_batch(model, encoder, prompts)
    # Some checkpoints set another repetition_penalty, which also applies to the prompt.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    rows = generate_ids(model, encoder, batch, **greedy, max_new_tokens=max_new_tokens, synced_gpus=synced)
    return [answer_text(tokenizer, row, encoder.stop_ids) for row in rows]


def prompt_batch(model: nn.Module, encoder: Encoder, prompts: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The inputs of ``generate`` for conversations that end with a user turn, left-padded, on the model's device."""
    batch = pad([encoder.encode(prompt, generate=True) for prompt in prompts], encoder.pad_id, side="left")
    device = device_of(model)
    return {key: value.to(device) for key, value in batch.items() if key not in ("labels", "position_ids")}


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs; offloaded parameters are on the meta device."""
    return next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")


def generate_ids(model: nn.Module, encoder: Encoder, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """New token ids of each row, which may go on after a stop token.

    Args:
        model: the model, or a PeftModel around it; its training mode is restored.
        encoder: that of the checkpoint; its stop tokens end a row.
        batch: of ``prompt_batch``.
        options: of ``generate``.
    """
    with torch.no_grad(), evaluating(model), working_in(model, encoder.downsample_mode):
        output = model.generate(  # pyright: ignore[reportCallIssue]
            **batch, **options, eos_token_id=encoder.stop_ids, pad_token_id=encoder.pad_id, use_cache=True
        )
    return output[:, batch["input_ids"].shape[1] :].tolist()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with the model in evaluation mode; restores the previous mode."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[Sample],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    description: str = "generating",
) -> list[str]:
    """Greedy answers to conversations that end with a user turn, in their order.

    Batches are left-padded and sorted by length to reduce padding; answers are returned in the order of the prompts.
    """
    answers = [""] * len(prompts)
    for chosen in tqdm(batches_by_length(encoder, prompts, batch_size), desc=description, leave=False):
        batch = [prompts[index] for index in chosen]
        texts = answer_batch(model, tokenizer, encoder, batch, max_new_tokens=max_new_tokens)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> str:
    """The text of generated ids up to the first stop token, with surrounding white space stripped."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    # Grounding tags are special tokens but part of the answer, so special tokens are not skipped.
    return str(tokenizer.decode(ids[:end], skip_special_tokens=False)).strip()
