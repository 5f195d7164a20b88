"""Patches merged to tokens by a merger of transformers, all items of a batch in one call."""

from __future__ import annotations

from typing import Any

import torch


def merge_patches(merger: Any, hidden: torch.Tensor, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Every merge kernel's patches to one token.

    The merger's own forward calls its layers once per item. Here they are called once, as ranks with other numbers of
    items would not agree otherwise (ZeRO-3).

    Args:
        merger: with ``mlp`` (one per round), ``merge_kernel_size`` and ``merger_times``.
        hidden: (N, D) all items one behind another.
        sizes: rows and columns per item; their products add up to N.

    Returns:
        (tokens, E) per item.
    """
    down, across = merger.merge_kernel_size
    for layer in merger.mlp[: merger.merger_times]:
        items = hidden.split([rows * columns for rows, columns in sizes])
        sizes = [(rows // down, columns // across) for rows, columns in sizes]
        blocks = [
            item.view(rows, down, columns, across, -1).transpose(1, 2).reshape(rows * columns, -1)
            for item, (rows, columns) in zip(items, sizes, strict=True)
        ]
        hidden = layer(torch.cat(blocks))
    return list(hidden.split([rows * columns for rows, columns in sizes]))
