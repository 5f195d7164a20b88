"""Gradient checkpointing per part of the model, and vision encoding in chunks (--checkpoint_parts, --vision_batch)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.families import detect


class MemorySavingMixin(PreTrainedModel):
    """Two settings of a model that save memory, both off by default.

    Attributes:
        vision_batch: maximum number of visual items per pass through the vision tower, None for all of a micro-batch.
            Items of a group (packed frames) stay together. This bounds memory if the vision part is frozen or its
            layers are recomputed. Audio clips likewise, except with ZeRO-3.
        checkpoint_parts: the parts with gradient checkpointing, None for all. A part without a graph stores no
            activations in either case.
    """

    vision_batch: int | None = None
    checkpoint_parts: Sequence[str] | None = None

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers, but only in ``checkpoint_parts``; also called under the newer name of this method."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about this name, which transformers itself still calls
            super().gradient_checkpointing_enable(*args, **kwargs)
        if self.checkpoint_parts is None:
            return
        for part, modules in detect(self.config.to_dict()).parts.items():
            if part not in self.checkpoint_parts:
                for module in modules:
                    _disable_checkpointing(self.get_submodule(module))


def _disable_checkpointing(part: nn.Module) -> None:
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False


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
