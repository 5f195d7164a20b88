"""Collation of examples into a model batch: padding (``pad``) or packing into one row (``pack``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import numpy as np
import torch

from finetune.encoding.example import Example
from finetune.encoding.media_collation import COLLATION
from finetune.encoding.worker_transfer import Lent, borrowed, lend
from finetune.templates.prompt_types import IGNORE

_SMALL = 1 << 18


class Batch(dict[str, Any]):
    """A collated batch: model inputs by name.

    When a dataloader worker sends it to the trainer, only large tensors go through shared memory, in blocks that are
    used again (``worker_transfer``); copying a small one costs less.
    """


def _sent(batch: Batch) -> tuple[Callable[..., Batch], tuple[dict[str, Any], Lent | None]]:
    """How a batch goes to another process."""
    tensors = {name: value for name, value in batch.items() if _on_cpu(value)}
    small = {name: value.numpy() for name, value in tensors.items() if value.nbytes <= _SMALL}
    lent = lend({name: value for name, value in tensors.items() if name not in small})
    in_block = () if lent is None else [name for name, *_ in lent.layout]
    return _received, ({**batch, **small, **dict.fromkeys(in_block)}, lent)


ForkingPickler.register(Batch, _sent)


def _on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _received(sent: Mapping[str, Any], lent: Lent | None) -> Batch:
    found = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in sent.items()}
    return Batch(found if lent is None else found | borrowed(lent))


def pad(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"] = "right") -> dict[str, torch.Tensor]:
    """One batch of B examples padded to the longest length T.

    Args:
        examples: at least one example; they are not modified.
        pad_id: padding token id; padding is masked, so any valid id works.
        side: padding side, "right" for training, "left" for generation.

    Returns:
        input_ids, attention_mask, labels: (B, T) int64, padding is 0 in the mask and -100 in labels. input_ids comes
        first: the HF Trainer takes the batch size from the first tensor. If an example has label weights,
        loss_weights: (B, T) float32, 1 elsewhere. The other keys depend on the ``inputs`` of the
        examples:

        * "patches": position_ids: (B, T) int64, padding 0; patches: (N, 3*P*P) uint8, all items of the batch;
          tgt_sizes: (n, 2) int64, rows and columns of patches; image_bound: (n, 3) int64, batch row, start, end (half
          open, in padded positions); temporal_ids: (n,) int64. With packed frames group_sizes: (g,) int64, items per
          row of image_bound, which is (g, 3) then. With audio audio_features: (chunks, bins, T) float32 log-mel,
          padding 0; audio_lengths: (chunks,) int64, mel frames; audio_bound: (m, 3) int64, as image_bound.
        * "packed": with images pixel_values: (1, 3, P, N*P) float32, all patches of the batch side by side, and
          target_sizes: (n, 2) int64; with videos pixel_values_videos and target_sizes_videos.
        * "canvas": as "packed", and mm_token_type_ids: (B, T) int64, 1 for image and 2 for video placeholders.

    Raises:
        ValueError: no example, or one whose first label is not -100 (no position predicts the first token).
    """
    if not examples:
        raise ValueError("cannot make a batch of no examples")
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE, dtype=torch.int64),
    }
    places = []
    for row, example in enumerate(examples):
        _check_first_label(example)
        size = len(example.input_ids)
        start = 0 if side == "right" else length - size
        places.append((row, start))
        place = slice(start, start + size)
        batch["input_ids"][row, place] = example.input_ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = example.labels
    if _weighted(examples):  # no name with "label", by which the Trainer takes an input for labels
        batch["loss_weights"] = torch.ones(shape)
        for (row, start), example in zip(places, examples, strict=True):
            batch["loss_weights"][row, start : start + len(example.input_ids)] = _weights_of(example)
    return batch | COLLATION[examples[0].inputs](examples, places, shape)


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """The examples packed into one row of T tokens, one segment each, without padding.

    Args:
        examples: s examples, at least one; attention does not cross segments.

    Returns:
        As ``pad``, with B = 1 and without attention_mask: position_ids restart at 0 in every segment; cu_seq_lens_q and
        cu_seq_lens_k: (s + 1,) int32, segment boundaries; max_length_q and max_length_k: int, the longest segment.

    Raises:
        ValueError: no example, or one whose first label is not -100.
    """
    if not examples:
        raise ValueError("cannot make a row of no examples")
    for example in examples:
        _check_first_label(example)
    lengths = [len(example.input_ids) for example in examples]
    ends = list(accumulate(lengths, initial=0))
    bounds, longest = torch.tensor(ends, dtype=torch.int32), max(lengths)
    places = [(0, start) for start in ends[:-1]]
    batch = {
        "input_ids": torch.cat([example.input_ids for example in examples])[None],
        "labels": torch.cat([example.labels for example in examples])[None],
        **({"loss_weights": torch.cat(list(map(_weights_of, examples)))[None]} if _weighted(examples) else {}),
        **COLLATION[examples[0].inputs](examples, places, (1, ends[-1])),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if "position_ids" not in batch:  # models that compute position ids would not restart them
        batch["position_ids"] = torch.cat([example.position_ids for example in examples])[None]
    return batch


def pairs_of(examples: Sequence[Example]) -> tuple[list[Example], dict[str, Any]]:
    """The rows of preference pairs, those with the chosen answers first, and further entries of their batch.

    Args:
        examples: pairs. One without ``rejected`` stands for a skipped pair and has no labels.

    Returns:
        2 B examples for ``pad`` or ``pack``; media_copies: 2, the rows that share the media; pair_weights: (B,)
        float32, 0 for a skipped pair; with references reference_logps: (B, 2) float32, of the chosen and the rejected
        answer.
    """
    rejected = [
        replace(example, borrows_media=True) if example.rejected is None else example.rejected for example in examples
    ]
    more: dict[str, Any] = {
        "media_copies": 2,
        "pair_weights": torch.tensor([float(example.rejected is not None) for example in examples]),
    }
    if any(example.reference is not None for example in examples):
        more["reference_logps"] = torch.tensor([example.reference or (0.0, 0.0) for example in examples])
    return [*examples, *rejected], more


def _weighted(examples: Sequence[Example]) -> bool:
    return any(example.loss_weights is not None for example in examples)


def _weights_of(example: Example) -> torch.Tensor:
    """The weights of an example's labels, (L,) float32."""
    return torch.ones(len(example.input_ids)) if example.loss_weights is None else example.loss_weights


def _check_first_label(example: Example) -> None:
    if example.labels[0] != IGNORE:
        raise ValueError(f"{example.source}: the first token has a label, but no position predicts it")
