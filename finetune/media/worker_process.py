"""How a process that prepares samples shares a machine, ends with its rank, and tells what it is doing.

It keeps freed memory, lets training go first, and notes the sample it is at where its rank can read that.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

import psutil
from torch.utils.data import get_worker_info

from finetune.runtime.processes import end_with_rank

# Of glibc's malloc.h, and the values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 128 << 20, 32 << 20
_NICENESS = 10

# Bytes for the name of the sample that a loader process is at, and seconds that it has to write its stacks.
_NAME = 512
_WRITES = 1.0
# Seconds that it has to end when its rank tells it to.
_ENDS = 2.0
# Files in memory, made by a rank before its loader processes, which inherit them: names of samples by process, stacks.
_notes: tuple[int, int] | None = None


def configure_worker(sample: str = "") -> None:
    """In a loader process, has it end with its rank, freed memory kept and training go first; elsewhere nothing.

    By default glibc hands large blocks back to the kernel, which clears every page again when the next picture comes.
    Up to 128 MiB stay with each process.

    Args:
        sample: what it is at now, for ``worker_report``.
    """
    if (worker := get_worker_info()) is not None:
        end_with_rank()
        keep_freed_memory()
        lower_worker_priority(worker.num_workers)
        _ignore_foreign_sigterm()
        _dump_stacks_on_signal()
        if _notes is not None:
            name = sample.encode(errors="replace")[:_NAME].ljust(_NAME, b"\0")
            os.pwrite(_notes[0], name, os.getpid() * _NAME)


@cache
def _ignore_foreign_sigterm() -> None:
    """Passes over SIGTERM of others: launchers and schedulers send it to all processes of a rank that is to save."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_sigterm, daemon=True, name="sigterm").start()


def _wait_for_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    # Its main thread ends it as Ctrl-C would and removes temporary files, unless it waits for a full pipe for ever.
    if (main := threading.main_thread().ident) is not None:
        signal.pthread_kill(main, signal.SIGINT)
    time.sleep(_ENDS)
    os._exit(0)


def enable_worker_reports() -> None:
    """Lets loader processes that are made from here on tell what they do; call it in their rank."""
    global _notes
    if _notes is None:
        _notes = os.memfd_create("samples"), os.memfd_create("stacks")


def worker_report() -> str:
    """The samples that the loader processes of this rank are at, and the stacks of their threads."""
    if _notes is None:
        return ""
    names, stacks = _notes
    asked = [child.pid for child in psutil.Process().children() if _answers(child.pid)]
    for process in asked:
        os.kill(process, signal.SIGUSR2)
    time.sleep(_WRITES)
    at = [os.pread(names, _NAME, process * _NAME).rstrip(b"\0").decode(errors="replace") for process in asked]
    lines = [f"loader process {process} is at {name}" for process, name in zip(asked, at, strict=True)]
    written = os.pread(stacks, os.fstat(stacks).st_size, 0)
    return "\n".join([*lines, "", written.decode(errors="replace")])


@cache
def _dump_stacks_on_signal() -> None:
    faulthandler.register(signal.SIGUSR2, file=sys.stderr if _notes is None else _notes[1])


def _answers(process: int) -> bool:
    """Whether a process has a handler for SIGUSR2, which ends others."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)


@cache
def keep_freed_memory() -> bool:
    """Whether this process now keeps what is freed: False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _KEPT)])


@cache
def lower_worker_priority(workers: int) -> bool:
    """Whether this process now has a low priority: where a node has fewer cores than processes of training.

    A rank that waits for its core keeps all others waiting; samples are prepared ahead, while ranks wait for each
    other. Where everybody has a core, nothing is changed: other people's jobs would go first as well.

    Args:
        workers: loader processes of each rank; the launcher says how many ranks the node has.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(os.sched_getaffinity(0)) >= ranks * (1 + workers):
        return False
    os.nice(_NICENESS)
    return True
