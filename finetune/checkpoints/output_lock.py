"""Lock of the output folder: a file lock, and a heartbeat for hosts of a shared folder that file locks do not reach."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from finetune.utils.errors import UserError

logger = logging.getLogger(__name__)

# Seconds between two heartbeats, and without a heartbeat until the owner on another host counts as dead.
HEARTBEAT = 15.0
SILENCE = 180.0
_LOCK, _OWNER = "lock", "owner.json"


class OutputInUseError(UserError):
    """Another run writes to the output folder."""


@dataclass(frozen=True, slots=True)
class LockOwner:
    """The process that holds the lock of a folder.

    Attributes:
        host: host name.
        pid: process id.
        started: start time, seconds since 1970.
        launcher: run id of torchrun, "none" without it.
    """

    host: str
    pid: int
    started: float
    launcher: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {since}, launcher {self.launcher}"


def this_process() -> LockOwner:
    """This process as an owner."""
    launcher = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return LockOwner(socket.gethostname(), os.getpid(), psutil.Process().create_time(), launcher)


class OutputLock:
    """Lock of a folder, held by this process until ``release``.

    The holder of the file lock owns the folder; the kernel frees it when the process ends. If file locks of another
    host are not visible here, its owner counts as alive while owner.json is younger than ``SILENCE``, by the clock of
    the file system.

    Args:
        folder: folder of the lock files; it is made.

    Raises:
        OutputInUseError: another run holds the lock; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._owner = folder / _OWNER
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        self._ended = threading.Event()
        previous = _read(self._owner)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputInUseError(_held(folder.parent, previous)) from None
        except NotImplementedError:
            logger.warning("%s does not support file locks: only the heartbeat protects it from other runs", folder)
        if previous is not None:
            self._take_over(folder, previous)
        self._beat()
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()

    def _take_over(self, folder: Path, previous: LockOwner) -> None:
        """Takes the lock over from an owner that is dead, with a warning.

        Raises:
            OutputInUseError: the owner is alive, or its heartbeat on another host is recent.
        """
        silent = _age(self._owner, folder)
        here = previous.host == socket.gethostname()
        if (here and _alive(previous)) or (not here and silent < SILENCE):
            self._lock.release()
            waits = (
                "" if here else f"; its last heartbeat is {silent:.0f} s old, after {SILENCE:.0f} s it counts as dead"
            )
            raise OutputInUseError(_held(folder.parent, previous) + waits)
        logger.warning(
            "%s was locked by %s, which has ended without releasing it (last heartbeat %.0f s ago): taken over",
            folder.parent, previous, silent,
        )  # fmt: skip

    def release(self) -> None:
        """Releases the lock."""
        self._ended.set()
        if self._lock.is_locked or _read(self._owner) == this_process():
            self._owner.unlink(missing_ok=True)
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _beat(self) -> None:
        text = json.dumps(asdict(this_process()))
        unfinished = self._owner.with_suffix(".tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self._owner)

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                self._beat()
            except OSError as error:  # a full disk, or a mount that is temporarily gone: the next one may succeed
                logger.debug("heartbeat not written to %s: %s", self._owner, error)


def _held(folder: Path, owner: LockOwner | None) -> str:
    who = "another run" if owner is None else str(owner)
    return f"OUTPUT_DIR {folder} is being written to by {who}: choose another folder, or wait for it to end"


def _read(path: Path) -> LockOwner | None:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return LockOwner(**values) if isinstance(values, Mapping) else None
    except (OSError, ValueError, TypeError):
        return None


def _age(path: Path, folder: Path) -> float:
    """Seconds since a file was written, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _alive(owner: LockOwner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner.started) < 1
    except psutil.NoSuchProcess:
        return False
