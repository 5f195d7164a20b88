"""Where things that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

Signature = tuple[str, int, int]


def folder() -> Path:
    """Where they are kept: ~/.cache/minicpmv-finetune, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicpmv-finetune"


def signature(path: Path) -> Signature:
    """State of a file: path, time of its last change in nanoseconds, size in bytes.

    Raises:
        OSError: it cannot be read.
    """
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size
