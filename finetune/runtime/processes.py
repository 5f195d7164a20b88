"""Processes that end with the one they belong to, whatever ended it."""

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
"""Environment variable of the process that another one ends with; it may have ended while that one was starting."""

PROCESSES = "processes"
"""Folder in it with a file per process of the run, named by its id, which says what it is."""

_RANK, _LOADER = "rank", "loader"

# prctl(2): the signal that the kernel sends to a process when its parent has ended.
_PR_SET_PDEATHSIG = 1
# Seconds between two looks at the parent where the kernel does not tell.
_LOOK_EVERY = 2.0


@cache
def end_with_parent(above: int | None = None) -> None:
    """From here on this process is killed when its parent ends, also by SIGKILL, and ends at once if it has already.

    The kernel sees to it; where a sandbox forbids that, a thread looks at the parent every two seconds.

    Args:
        above: id of a process that is above it as long as that one lives; the parent if it is not given.
    """
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    told = prctl is not None and prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent or (above not in (None, parent) and above not in _ancestors()):
        os._exit(128 + signal.SIGKILL)
    if not told:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent").start()


def _ancestors() -> list[int]:
    return [process.pid for process in psutil.Process().parents()]


def end_with_launcher() -> None:
    """Ends this process with its parent where a launcher, or a rank, has started it."""
    if (above := os.environ.get(ABOVE)) is not None:
        end_with_parent(int(above))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        _enter(_RANK)


def end_with_rank() -> None:
    """Ends a loader process with the rank that it prepares samples for."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)
        _enter(_LOADER)


@cache
def _enter(kind: str) -> None:
    """Lets the launcher know of this process, so that it can remove what is left of it."""
    if (folder := os.environ.get(RUN_FOLDER)) is not None:
        (Path(folder) / PROCESSES).mkdir(exist_ok=True)
        (Path(folder) / PROCESSES / str(os.getpid())).write_text(kind, encoding="ascii")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(128 + signal.SIGKILL)


def end_children() -> None:
    """Tells all loader processes of this one to end, so that none of them is waited for, one after another."""
    for child in multiprocessing.active_children():
        child.terminate()


def a_rank_has_died() -> bool:
    """Whether another rank of the run on this machine has ended; False where our launcher has not started them."""
    folder = Path(os.environ.get(RUN_FOLDER, ""), PROCESSES)
    ranks = [int(path.name) for path in folder.glob("[0-9]*") if path.read_text(encoding="ascii") == _RANK]
    return not all(_is_alive(process) for process in ranks)


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
