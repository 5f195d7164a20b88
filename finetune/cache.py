"""Where things that can be made again are kept between runs."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from finetune.paths import home

logger = logging.getLogger(__name__)

Signature = tuple[str, int, int]


def folder() -> Path:
    """Where they are kept: ~/.cache/minicpmv-finetune, or under XDG_CACHE_HOME; without a home, for this process."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "minicpmv-finetune"
    known = home()
    return _of_this_process() if known is None else known / ".cache" / "minicpmv-finetune"


@lru_cache(maxsize=1)
def _of_this_process() -> Path:
    logger.warning("no home folder: what could be kept between runs is not; set HOME or XDG_CACHE_HOME")
    made = Path(tempfile.mkdtemp(prefix="minicpmv-finetune-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def signature(path: Path) -> Signature:
    """State of a file: path, time of its last change in nanoseconds, size in bytes.

    Raises:
        OSError: it cannot be read.
    """
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size
