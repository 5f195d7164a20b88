"""``compiled``: numba JIT compilation with an on-disk cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compiles a function with ``numba.njit`` on its first call, cached on disk if a cache folder is writable.

    The cache is ``__pycache__`` beside the source, NUMBA_CACHE_DIR, or the user's cache folder.
    """
    try:
        made: Any = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable cache folder
        made = njit(nogil=True)(function)
    return made
