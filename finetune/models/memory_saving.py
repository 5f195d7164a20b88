"""Gradient checkpointing per part of the model, and vision encoding in chunks (--checkpoint_parts, --vision_batch)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.families import detect
from finetune.models.visual_items import VisualItems, split_items

RESAMPLED_PATCHES = 2048
"""Patches per chunk of a resampler that is recomputed, unless a group has more."""


class MemorySavingMixin(PreTrainedModel):
    """Settings of a model that save memory, all off by default.

    Attributes:
        vision_batch: maximum number of visual items per pass through the vision tower, None for all of a micro-batch.
            Items of a group (packed frames) stay together. This bounds memory if the vision part is frozen or its
            layers are recomputed. Audio clips likewise, except with ZeRO-3.
        checkpoint_parts: the parts with gradient checkpointing, None for all. A part without a graph stores no
            activations in either case.
        recompute_resampler: whether a trained resampler is recomputed as well, so with gradient checkpointing of all
            parts. It is called on a few items at a time then, since its activations grow with the patches.
    """

    vision_batch: int | None = None
    checkpoint_parts: Sequence[str] | None = None
    recompute_resampler: bool = False

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers, but only in ``checkpoint_parts``; also called under the newer name of this method."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about this name, which transformers itself still calls
            super().gradient_checkpointing_enable(*args, **kwargs)
        self.recompute_resampler = self.checkpoint_parts is None
        if self.checkpoint_parts is None:
            return
        for part, modules in detect(self.config.to_dict()).parts.items():
            if part not in self.checkpoint_parts:
                for module in modules:
                    _disable_checkpointing(self.get_submodule(module))

    def gradient_checkpointing_disable(self) -> None:
        """As in transformers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as above
            super().gradient_checkpointing_disable()
        self.recompute_resampler = False


def _disable_checkpointing(part: nn.Module) -> None:
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False


def recomputed_in_chunks(resampler: nn.Module, features: VisualItems) -> torch.Tensor:
    """The result of a resampler that is recomputed in the backward pass, a chunk of groups at a time: (g, Q, E).

    With ZeRO-3 in one chunk, as every rank must call it equally often.

    Args:
        resampler: a ``Resampler``.
        features: items with the features of their patches, (N, D).
    """
    patches = iter([rows * columns for rows, columns in features.sizes])
    counts = chunk_counts([sum(islice(patches, count)) for count in features.groups], RESAMPLED_PATCHES)
    chunks = [features] if is_partitioned(resampler) else split_items(features, counts)
    return torch.cat(
        [
            checkpoint(resampler, chunk.patches, chunk.sizes, chunk.times, chunk.groups, use_reentrant=False)
            for chunk in chunks
        ]
    )


def chunk_counts(groups: Sequence[int], most: int | None) -> list[int]:
    """Number of groups per chunk, at least one.

    Args:
        groups: items per group.
        most: maximum number of items per chunk, unless a group is larger; None for one chunk.
    """
    if most is None:
        return [len(groups)]
    counts, items = [0], 0
    for group in groups:
        if counts[-1] and items + group > most:
            counts.append(0)
            items = 0
        counts[-1] += 1
        items += group
    return counts


def is_partitioned(part: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the weights of a part."""
    return any(hasattr(parameter, "ds_id") for parameter in part.parameters())


def chunks_on_all_ranks(count: int, part: nn.Module, device: torch.device) -> int:
    """The largest number of chunks of any rank, if ranks must call a part equally often (ZeRO-3); else ``count``.

    Every rank must call it in every step, before the part is called: this reduction must not be interleaved with the
    gathering of weights in another order on every rank.
    """
    if not is_partitioned(part) or not torch.distributed.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)
