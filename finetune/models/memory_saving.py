"""Memory saved inside the networks: layers run again part by part, and visual items encoded in pieces."""

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
    """Two settings of a network, both off until they are set.

    Attributes:
        vision_batch: most visual items that pass the vision part at once, None for all of a micro-batch. Items of a
            group (packed frames) stay together. Where nothing of the vision part trains, or its layers are run again,
            this bounds its memory. Clips of sound likewise, except under ZeRO-3.
        checkpoint_parts: the parts whose layers activation checkpointing runs again, None for all. A part without a
            graph keeps nothing in either case.
    """

    vision_batch: int | None = None
    checkpoint_parts: Sequence[str] | None = None

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers, which its newer name calls too; only in ``checkpoint_parts``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about this name, under which it still looks for us
            super().gradient_checkpointing_enable(*args, **kwargs)
        if self.checkpoint_parts is None:
            return
        for part, modules in detect(self.config.to_dict()).parts.items():
            if part not in self.checkpoint_parts:
                for module in modules:
                    _leave_out(self.get_submodule(module))


def _leave_out(part: nn.Module) -> None:
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = False


def pieces(groups: Sequence[int], most: int | None) -> list[int]:
    """How many groups go into each piece, at least one.

    Args:
        groups: items per group.
        most: items per piece; None for one piece.
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
    """Whether ZeRO-3 has divided the weights of a part among the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in part.parameters())


def pieces_on_all_ranks(count: int, part: nn.Module, device: torch.device) -> int:
    """The largest number of pieces that any rank has, where ranks must call a part equally often (ZeRO-3).

    To be asked by every rank in every step, before the part is called: asked later, it would come between the weights
    that ZeRO-3 gathers, at another place on every rank.
    """
    if not is_partitioned(part) or not torch.distributed.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)
