"""How a process that prepares samples shares a machine: what it does with freed memory, and whose turn comes first."""

from __future__ import annotations

import ctypes
import os
from functools import cache

from torch.utils.data import get_worker_info

# Of glibc's malloc.h, and the values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 128 << 20, 32 << 20
_NICENESS = 10


def settle() -> None:
    """In a loader process, has freed memory kept and training go first; elsewhere nothing is changed.

    By default glibc hands large blocks back to the kernel, which clears every page again when the next picture comes.
    Up to 128 MiB stay with each process.
    """
    if (worker := get_worker_info()) is not None:
        keep_freed_memory()
        let_training_go_first(worker.num_workers)


@cache
def keep_freed_memory() -> bool:
    """Whether this process now keeps what is freed: False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _KEPT)])


@cache
def let_training_go_first(workers: int) -> bool:
    """Whether this process now has a low priority: where a node has fewer cores than processes of training.

    A rank that waits for its core keeps all others waiting; samples are prepared ahead, while ranks wait for each
    other. Where everybody has a core, nothing is changed: other people's jobs would go first as well.

    Args:
        workers: loader processes of each rank; the launcher says how many ranks the node has.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(os.sched_getaffinity(0)) >= ranks * (1 + workers):
        return False
    os.nice(_NICENESS)
    return True
