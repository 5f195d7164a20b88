"""Functions that numba compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """The function as machine code, made when it is first called and kept on disk where a folder can be written.

    That is ``__pycache__`` beside the source, NUMBA_CACHE_DIR, or the user's cache folder.
    """
    try:
        made: Any = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no such folder
        made = njit(nogil=True)(function)
    return made
