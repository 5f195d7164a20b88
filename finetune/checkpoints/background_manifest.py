"""Completes checkpoints while training goes on: a thread hashes the files and writes the manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.checkpoints import manifest
from finetune.checkpoints.disk_space import write_fault

logger = logging.getLogger(__name__)


class BackgroundManifest:
    """Writes one manifest at a time; used on rank 0 alone.

    Until it is written the checkpoint is not complete: a run that is killed before resumes from the one before, which
    is why nothing older is removed while ``busy``.

    Args:
        completed: called in the thread with the folder of a checkpoint that has become complete.
    """

    def __init__(self, completed: Callable[[Path], None] | None = None) -> None:
        self._completed = completed
        self._threads: ThreadPoolExecutor | None = None
        self._folder: Path | None = None
        self._work: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a manifest is being written."""
        return self._work is not None and not self._work.done()

    def start(self, folder: Path, step: int, fields: dict[str, Any]) -> None:
        """Starts to complete a checkpoint whose files are all written; ``wait`` must have been called for the last.

        Args:
            folder: of the checkpoint.
            step: optimizer steps done.
            fields: the other fields of the manifest.
        """
        assert self._work is None, "wait() comes first"
        self._threads = self._threads or ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._folder, self._work = folder, self._threads.submit(self._write, folder, step, fields)

    def wait(self) -> str | None:
        """Waits for the manifest; returns why it could not be written, None if it was or there is none."""
        work, self._work = self._work, None
        if work is None:
            return None
        try:
            work.result()
        except OSError as error:
            return f"{self._folder} is not complete and will be skipped: {write_fault(error) or error}"
        return None

    def _write(self, folder: Path, step: int, fields: dict[str, Any]) -> None:
        manifest.write(folder, step, fields)
        if self._completed is not None:
            self._completed(folder)
