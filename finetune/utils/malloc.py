"""Settings of glibc's malloc: whether a process keeps the memory of large blocks that it frees."""

from __future__ import annotations

import ctypes
from functools import cache

# mallopt parameters of glibc's malloc.h, and their values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 128 << 20, 32 << 20
_SMALLEST = 128 << 10


@cache
def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory, up to 128 MiB; False where the C library is not glibc.

    By default it returns large blocks to the kernel, which zeroes the pages again for the next image.
    """
    return _set({_MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: _KEPT})


@cache
def return_freed_memory() -> bool:
    """Makes malloc return every block of 128 KiB or more when it is freed; False where the C library is not glibc.

    By default it raises this threshold up to 32 MiB at the first large block that is freed. Tensors after it share one
    heap with small blocks, and the gaps that they leave can add up to the size of the model.
    """
    return _set({_MMAP_THRESHOLD: _SMALLEST})


def _set(values: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, value) for name, value in values.items()])
