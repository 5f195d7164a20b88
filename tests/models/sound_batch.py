"""Batches with audio for the model tests."""

from __future__ import annotations

import torch
from visual_batch import Row, make_batch

from finetune.models import MiniCPMO

BINS = 80


def mel(frames: int, seed: int) -> torch.Tensor:
    """(bins, frames) noise."""
    return torch.randn(BINS, frames, generator=torch.Generator().manual_seed(seed))


def tokens_of(frames: int, step: int) -> int:
    return ((frames - 1) // 2 + 1 - step) // step + 1


def add_clips(
    batch: dict[str, torch.Tensor], rows: list[list[int]], step: int, run: int | None = None
) -> dict[str, torch.Tensor]:
    """The batch with the clips of every row (mel frames each) in the place of its first text tokens.

    Args:
        batch: rows whose leading text is long enough.
        rows: lengths of the clips of each row.
        step: outputs of the tower per token.
        run: placeholders of each run, the clips of a row poured over them; None for one run per clip.
    """
    clips, bounds = [], []
    for row, lengths in enumerate(rows):
        at = int(batch["attention_mask"][row].argmax()) + 1
        clips += [mel(length, seed=length + index) for index, length in enumerate(lengths)]
        counts = [tokens_of(length, step) for length in lengths]
        if run is not None:
            total = sum(counts)
            counts = [min(run, total - start) for start in range(0, total, run)]
        for count in counts:
            bounds.append([row, at, at + count])
            at += count
    sound = torch.nn.utils.rnn.pad_sequence([clip.T for clip in clips], batch_first=True).transpose(1, 2)
    return batch | {
        "audio_features": sound,
        "audio_lengths": torch.tensor([clip.shape[1] for clip in clips]),
        "audio_bound": torch.tensor(bounds),
    }


def sound_batch(
    model: MiniCPMO, rows: list[tuple[Row, list[int]]], *, side: str = "right", run: int | None = None
) -> dict[str, torch.Tensor]:
    """A batch of rows of images and text, each with its clips; rows without clips among them."""
    batch = make_batch([row for row, _ in rows], model.query_num, side=side)
    return add_clips(batch, [lengths for _, lengths in rows], model.pool_step, run)
