"""Where things that can be made again are kept between runs."""

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
# Files of killed runs: no run of today writes one for as long as this (seconds).
_OLD = 24 * 3600
# As earlier versions called theirs.
_FORMER = re.compile(r"index-\w{8}|check-\w+\.\d+|sizes-\w+\.\d+\.npy")


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
    """State of a file: path, time of its last change in nanoseconds, size in bytes, inode, time of change of that.

    The last two tell files apart that were put in place of each other with the time of the first, as rsync -t and
    archives do.

    Raises:
        OSError: it cannot be read.
    """
    return str(path), *state_of(path.stat())


def state_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """State of a file without its path, as ``signature`` has it."""
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


@contextmanager
def replacing(place: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place when it is finished; what is unfinished goes, of killed runs after a day.

    Several processes may write the same one at once: each has a file of its own, and the last one stays.

    Raises:
        OSError: it cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f"{place.name}.", suffix=_UNFINISHED, delete=False) as to:
        partial = Path(to.name)
        try:
            yield to
            to.close()
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)


def _sweep(where: Path) -> None:
    """Removes the unfinished files of killed runs."""
    for file in where.iterdir():
        if file.name.endswith(_UNFINISHED) or _FORMER.fullmatch(file.name):
            try:
                if time.time() - file.stat().st_mtime > _OLD:
                    file.unlink()
            except FileNotFoundError:  # another process was first
                continue
