"""Sends large tensors from dataloader workers through shared memory that is used again.

torch sends every tensor in a new block of shared memory. Most of the time then goes into its pages: the kernel makes
and clears each of them, in the worker, and maps them, in the trainer. Here a worker keeps its blocks. Which of them
are in use is told by a shared tensor with a byte per block: the worker sets it, and the trainer clears it when the last
tensor of a batch is freed.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch.utils.data import get_worker_info

# Blocks of a worker; batches beyond them go torch's way.
_MOST = 32
_ALIGNED = 64
# A new block is larger than its first batch by this share.
_SPARE = 0.25


Layout = Sequence[tuple[str, torch.dtype, torch.Size, int]]
"""Name, dtype, shape and first byte of every tensor in a block."""


@dataclass(frozen=True, slots=True)
class Lent:
    """Tensors in a block of shared memory, as they are sent.

    Attributes:
        pool: process id of the worker, and an id of its blocks.
        number: of the block.
        layout: of the tensors.
        block: the block, when it is sent for the first time.
        used: which blocks are in use, (_MOST,) uint8; sent with ``block``.
    """

    pool: tuple[int, str]
    number: int
    layout: Layout
    block: torch.Tensor | None
    used: torch.Tensor | None


@dataclass(slots=True)
class _Pool:
    """The blocks of a worker."""

    key: tuple[int, str] = field(default_factory=lambda: (os.getpid(), uuid.uuid4().hex))
    blocks: list[torch.Tensor] = field(default_factory=list)
    used: torch.Tensor = field(default_factory=lambda: torch.zeros(_MOST, dtype=torch.uint8).share_memory_())

    def take(self, size: int) -> tuple[int, bool] | None:
        """Number of a free block of at least that size, and whether it is new; None if all are in use."""
        free = [number for number in range(len(self.blocks)) if not self.used[number]]
        for number in free:
            if len(self.blocks[number]) >= size:
                return number, False
        if len(self.blocks) == _MOST and not free:
            return None
        block = torch.empty(size + round(_SPARE * size), dtype=torch.uint8).share_memory_()
        if not free:
            self.blocks.append(block)
            return len(self.blocks) - 1, True
        self.blocks[free[0]] = block
        return free[0], True


_pool: _Pool | None = None
# In the trainer: the blocks of every worker, and which of them are in use. Arrays, as those have no dispatch modes.
_blocks: dict[tuple[int, str], tuple[dict[int, np.ndarray], np.ndarray]] = {}


def lend(tensors: Mapping[str, torch.Tensor]) -> Lent | None:
    """Copies tensors into a block that is free; None outside of dataloader workers, and when all blocks are in use."""
    global _pool
    if get_worker_info() is None or not tensors:
        return None
    if _pool is None or _pool.key[0] != os.getpid():
        _pool = _Pool()
    layout, size = [], 0
    for name, tensor in tensors.items():
        layout.append((name, tensor.dtype, tensor.shape, size))
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    if (taken := _pool.take(size)) is None:
        return None
    number, new = taken
    for tensor, view in zip(tensors.values(), _views(_pool.blocks[number], layout).values(), strict=True):
        view.copy_(tensor)
    _pool.used[number] = 1
    sent = (_pool.blocks[number], _pool.used) if new else (None, None)
    return Lent(_pool.key, number, layout, *sent)


def borrowed(lent: Lent) -> dict[str, torch.Tensor]:
    """The tensors; their block is free again when the last of them, and of their views, is freed."""
    if lent.block is not None and lent.used is not None:
        if lent.pool not in _blocks:
            _forget_ended_workers()
        _blocks.setdefault(lent.pool, ({}, lent.used.numpy()))[0][lent.number] = lent.block.numpy()
    blocks, used = _blocks[lent.pool]
    # A new array of the same memory, which a tensor made from it holds until its own memory is freed.
    array = blocks[lent.number][:]
    weakref.finalize(array, _return, used, lent.number).atexit = False
    return _views(torch.from_numpy(array), lent.layout)


def _return(used: np.ndarray, number: int) -> None:
    used[number] = 0


def _forget_ended_workers() -> None:
    for pool in list(_blocks):
        if not psutil.pid_exists(pool[0]):
            _blocks.pop(pool, None)


def _views(block: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors in a block."""
    return {
        name: block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, dtype, shape, start in layout
    }
