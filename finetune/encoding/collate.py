"""Examples become the padded batch that the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from finetune.encoding.example import Example
from finetune.templates.rendering import IGNORE


def pad(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"] = "right") -> dict[str, torch.Tensor]:
    """One batch of B examples padded to their longest length T.

    Args:
        examples: at least one example, none of them changed.
        pad_id: id written into padding; it is masked, so any valid id serves.
        side: "right" for training, "left" for generation.

    Returns:
        input_ids, attention_mask, position_ids, labels: (B, T) int64, padding 0 in mask and positions, -100 in labels;
        patches: (N, 3*P*P) uint8, all items of the batch; tgt_sizes: (n, 2) int64; image_bound: (n, 3) int64, batch
        row, start, end (half open, in padded positions); temporal_ids: (n,) int64. input_ids comes first: the HF
        Trainer reads the batch size off the first tensor.

    Raises:
        ValueError: no example, or one whose first label is not -100 (nothing predicts the first token).
    """
    if not examples:
        raise ValueError("cannot make a batch of no examples")
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE, dtype=torch.int64),
    }
    bounds = []
    for row, example in enumerate(examples):
        if example.labels[0] != IGNORE:
            raise ValueError(f"{example.source}: the first token carries a label, but nothing predicts it")
        size = len(example.input_ids)
        start = 0 if side == "right" else length - size
        place = slice(start, start + size)
        batch["input_ids"][row, place] = example.input_ids
        batch["attention_mask"][row, place] = 1
        batch["position_ids"][row, place] = example.position_ids
        batch["labels"][row, place] = example.labels
        rows = torch.full((len(example.image_bound), 1), row, dtype=torch.int64)
        bounds.append(torch.cat([rows, example.image_bound + start], dim=1))
    batch["patches"] = torch.cat([example.patches for example in examples])
    batch["tgt_sizes"] = torch.cat([example.tgt_sizes for example in examples])
    batch["image_bound"] = torch.cat(bounds)
    batch["temporal_ids"] = torch.cat([example.temporal_ids for example in examples])
    return batch
