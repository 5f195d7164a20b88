"""Greedy generation in left-padded batches, with prompts encoded exactly as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.models.downsample_mode import working_in
from finetune.sample import DataError, Sample


def split_answer(sample: Sample) -> tuple[Sample, str]:
    """A sample without its last turn, and the text of that turn.

    Raises:
        DataError: the last turn is not the assistant's, it calls tools, or it is the only turn.
    """
    *before, last = sample.messages
    if last.role != "assistant" or not before:
        raise DataError(
            f"{sample.source}: the last turn is a {last.role} turn; the last turn must be the reference answer"
        )
    if last.calls:
        raise DataError(
            f"{sample.source}: the last turn calls tools, which is no text to compare answers with; end the "
            "record with a text answer, or remove it"
        )
    return replace(sample, messages=tuple(before)), last.text


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
    stops, pad_id = encoder.stop_ids, encoder.pad_id
    device = next(model.parameters()).device
    batch = pad([encoder.encode(prompt, generate=True) for prompt in prompts], pad_id, side="left")
    batch = {key: value.to(device) for key, value in batch.items() if key not in ("labels", "position_ids")}
    training = model.training
    model.eval()
    with torch.no_grad(), working_in(model, encoder.downsample_mode):
        output = model.generate(  # pyright: ignore[reportCallIssue]
            **batch,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some checkpoints set another, which also applies to the prompt
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad_id,
            synced_gpus=synced,
        )
    model.train(training)
    return [answer_text(tokenizer, row, stops) for row in output[:, batch["input_ids"].shape[1] :].tolist()]


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
