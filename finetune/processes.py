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

PROCESSES = "processes"
"""Folder in it with a file per process of the run, named by its id, which says what it is."""

_RANK, _LOADER = "rank", "loader"

# prctl(2): the signal that the kernel sends to a process when its parent has ended.
_PR_SET_PDEATHSIG = 1
# Seconds between two looks at the parent where the kernel does not tell.
_LOOK_EVERY = 2.0


@cache
def end_with_parent(parent: int | None = None) -> None:
    """From here on this process is killed when its parent ends, also by SIGKILL, and ends at once if it has already.

    The kernel sees to it; where a sandbox forbids that, a thread looks at the parent every two seconds.

    Args:
        parent: its process id, the present one if it is not given.
    """
    expected = os.getppid() if parent is None else parent
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    told = prctl is not None and prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != expected:
        os._exit(128 + signal.SIGKILL)
    if not told:
        threading.Thread(target=_watch, args=(expected,), daemon=True, name="parent").start()


def end_with_launcher() -> None:
    """Ends this process with its parent where torchrun, or a rank that torchrun started, has started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
        if "RANK" in os.environ:
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
