"""What a process that prepares samples does with the memory that pictures free."""

from __future__ import annotations

import ctypes
from functools import cache

from torch.utils.data import get_worker_info

# Of glibc's malloc.h, and the values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 128 << 20, 32 << 20


def settle() -> None:
    """In a loader process, has freed memory kept for the next picture; elsewhere nothing is changed.

    By default glibc hands large blocks back to the kernel, which clears every page again when the next picture comes.
    Up to 128 MiB stay with each process.
    """
    if get_worker_info() is not None:
        keep_freed_memory()


@cache
def keep_freed_memory() -> bool:
    """Whether this process now keeps what is freed: False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _KEPT)])
