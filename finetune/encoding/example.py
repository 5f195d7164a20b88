"""The tensors of one sample: what the encoder gives and the collator takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One encoded sample of L tokens, n visual items with N patches in all, and a sound of m runs of placeholders.

    Items next to each other may form a group, frames of a video that are packed; there are g of them, n without any.

    Attributes:
        input_ids: (L,) int64.
        labels: (L,) int64, unshifted, -100 = no loss; the first one is always -100.
        position_ids: (L,) int64, from 0.
        patches: (N, 3*P*P), P = patch size; each row one patch in (channel, row, column) order, items one after
            another, patches of an item row by row. uint8, which the network normalises: x / 255, mean 0.5, std 0.5; or
            float32, normalised, where the family keeps the pixels of a published processor.
        tgt_sizes: (n, 2) int64, rows and columns of patches per item; their products add up to N.
        image_bound: (g, 2) int64, half-open token range of each group's placeholders.
        temporal_ids: (n,) int64, time index of a packed video frame, -1 for a still image.
        group_sizes: (g,) int64, items per group; None when every item is a group.
        from_video: (n,) bool, whether an item comes from a video, for networks that tell them apart; None for none.
        audio: log-mel frames of every clip, (bins, T) float32; longer sound in pieces, one behind another.
        audio_bound: (m, 2) int64, half-open token range of each run of placeholders of sound; the clips fill the runs
            one after another.
        source: where the sample came from, for messages.
        inputs: how the images reach the network, a key of the table in ``finetune.encoding.pixel_inputs``.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    patches: torch.Tensor
    tgt_sizes: torch.Tensor
    image_bound: torch.Tensor
    temporal_ids: torch.Tensor
    source: str
    audio: tuple[torch.Tensor, ...] = ()
    audio_bound: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    group_sizes: torch.Tensor | None = None
    from_video: torch.Tensor | None = None
    inputs: str = "patches"
