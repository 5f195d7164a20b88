"""Ends ranks when their launcher ends, and dataloader workers when their rank does, also by SIGKILL."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from functools import cache
from pathlib import Path

import psutil

RUN_FOLDER = "FINETUNE_RUN_FOLDER"
"""Environment variable of the launcher's folder for a run."""

ABOVE = "FINETUNE_ABOVE"
"""Environment variable with the id of the process that a child ends with; it may have ended before the child starts."""

PROCESSES = "processes"
"""Folder in RUN_FOLDER with a file per process of the run, named by its id; the content is its kind."""

_RANK, _WORKER = "rank", "loader"

# prctl(2): the kernel sends this process a signal when its parent has ended.
_PR_SET_PDEATHSIG = 1
# Seconds between checks of the parent where prctl is not available.
_POLL_SECONDS = 2.0


@cache
def end_with_parent(above: int | None = None) -> None:
    """Has this process killed when its parent ends, also by SIGKILL; ends it at once if the parent has ended already.

    By prctl(2); where a sandbox forbids that, a thread checks the parent every two seconds.

    Args:
        above: id of a process that must be among the ancestors; the parent by default.
    """
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    armed = prctl is not None and prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent or (above not in (None, parent) and above not in _ancestors()):
        os._exit(128 + signal.SIGKILL)
    if not armed:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent").start()


def _ancestors() -> list[int]:
    return [process.pid for process in psutil.Process().parents()]


def end_with_launcher() -> None:
    """Ends this process with its parent if it was started by a launcher or a rank."""
    if (above := os.environ.get(ABOVE)) is not None:
        end_with_parent(int(above))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        _register(_RANK)


def end_with_rank() -> None:
    """Ends a dataloader worker with its rank."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)
        _register(_WORKER)


@cache
def _register(kind: str) -> None:
    """Registers this process with the launcher, which removes what it leaves in shared memory."""
    if (folder := os.environ.get(RUN_FOLDER)) is not None:
        (Path(folder) / PROCESSES).mkdir(exist_ok=True)
        (Path(folder) / PROCESSES / str(os.getpid())).write_text(kind, encoding="ascii")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(128 + signal.SIGKILL)


def end_children() -> None:
    """Terminates all dataloader workers of this process at once instead of waiting for one after another."""
    for child in multiprocessing.active_children():
        child.terminate()


def any_rank_died() -> bool:
    """Whether another rank of the run on this machine has ended; False without our launcher."""
    folder = Path(os.environ.get(RUN_FOLDER, ""), PROCESSES)
    ranks = [int(path.name) for path in folder.glob("[0-9]*") if path.read_text(encoding="ascii") == _RANK]
    return not all(_is_alive(process) for process in ranks)


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
