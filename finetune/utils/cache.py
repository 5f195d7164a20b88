"""Cache directory for data indexes and check results; atomic writes into it."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

from finetune.utils.paths import home

logger = logging.getLogger(__name__)

Signature = tuple[str, int, int, int, int]

_UNFINISHED = ".unfinished"
# Unfinished files older than this (seconds) belong to killed runs: no write takes a day.
_STALE_SECONDS = 24 * 3600
# Unfinished files of earlier versions.
_OLD_NAMES = re.compile(r"index-\w{8}|check-\w+\.\d+|sizes-\w+\.\d+\.npy")


def folder() -> Path:
    """The cache directory: ~/.cache/minicpmv-finetune, or under XDG_CACHE_HOME; temporary without a home folder."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "minicpmv-finetune"
    known = home()
    return _temporary_folder() if known is None else known / ".cache" / "minicpmv-finetune"


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    logger.warning("no home folder: nothing is cached between runs; set HOME or XDG_CACHE_HOME")
    made = Path(tempfile.mkdtemp(prefix="minicpmv-finetune-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def signature(path: Path) -> Signature:
    """Identity of a file's content: path, mtime in nanoseconds, size in bytes, inode, ctime in nanoseconds.

    Inode and ctime detect a file that was replaced by one with the same mtime, as rsync -t and archives do.

    Raises:
        OSError: it cannot be read.
    """
    return str(path), *state_of(path.stat())


def state_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """Mtime, size, inode and ctime, as in ``signature``."""
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


@contextmanager
def atomic_write(place: Path) -> Iterator[IO[bytes]]:
    """A temporary file that is renamed to ``place`` when it is complete, and removed otherwise.

    Several processes may write the same file at once: each has a temporary file of its own, and the last rename wins.
    Temporary files of killed runs are removed after a day.

    Raises:
        OSError: it cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(place.parent)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f"{place.name}.", suffix=_UNFINISHED, delete=False) as to:
        partial = Path(to.name)
        try:
            yield to
            to.close()
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)


def _remove_stale(where: Path) -> None:
    """Removes the unfinished files of killed runs."""
    for file in where.iterdir():
        if file.name.endswith(_UNFINISHED) or _OLD_NAMES.fullmatch(file.name):
            try:
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()
            except FileNotFoundError:  # another process has removed it
                continue
