"""Set-up of dataloader workers: malloc settings, niceness, exit with their rank, and hang diagnostics.

A worker records the sample that it encodes where its rank can read it (``worker_report``).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

import psutil

from finetune.runtime.processes import end_with_rank
from finetune.utils.malloc import keep_freed_memory

_NICENESS = 10

# Bytes for the name of a worker's current sample, and seconds to wait for its stack dump.
_NAME = 512
_WRITES = 1.0
# Seconds that a worker has to exit after SIGTERM from its rank.
_ENDS = 2.0
# memfd files created by the rank and inherited by its dataloader workers: sample names by process id, stack dumps.
_report_files: tuple[int, int] | None = None


def configure_worker(sample: str = "") -> None:
    """Sets up the dataloader worker that calls it (once) and records its current sample; no effect elsewhere.

    Args:
        sample: name of the current sample, for ``worker_report``.
    """
    if "torch" not in sys.modules:  # a check of data; every dataloader worker has it
        return
    from torch.utils.data import get_worker_info

    if (worker := get_worker_info()) is not None:
        end_with_rank()
        keep_freed_memory()
        lower_worker_priority(worker.num_workers)
        _ignore_foreign_sigterm()
        _dump_stacks_on_signal()
        if _report_files is not None:
            name = sample.encode(errors="replace")[:_NAME].ljust(_NAME, b"\0")
            os.pwrite(_report_files[0], name, os.getpid() * _NAME)


@cache
def _ignore_foreign_sigterm() -> None:
    """Ignores SIGTERM unless its rank sent it: launchers signal all processes of a rank that is about to save."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_sigterm, daemon=True, name="sigterm").start()


def _wait_for_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    # SIGINT lets the main thread clean up temporary files; it may hang on a full pipe, hence the hard exit below.
    if (main := threading.main_thread().ident) is not None:
        signal.pthread_kill(main, signal.SIGINT)
    time.sleep(_ENDS)
    os._exit(0)


def enable_worker_reports() -> None:
    """Enables ``worker_report`` for dataloader workers that this rank starts from now on."""
    global _report_files
    if _report_files is None:
        _report_files = os.memfd_create("samples"), os.memfd_create("stacks")


def worker_report() -> str:
    """The current sample of every dataloader worker of this rank, and the stacks of their threads."""
    if _report_files is None:
        return ""
    names, stacks = _report_files
    asked = [child.pid for child in psutil.Process().children() if _handles_sigusr2(child.pid)]
    for process in asked:
        os.kill(process, signal.SIGUSR2)
    time.sleep(_WRITES)
    at = [os.pread(names, _NAME, process * _NAME).rstrip(b"\0").decode(errors="replace") for process in asked]
    lines = [f"dataloader worker {process} encodes {name}" for process, name in zip(asked, at, strict=True)]
    written = os.pread(stacks, os.fstat(stacks).st_size, 0)
    return "\n".join([*lines, "", written.decode(errors="replace")])


@cache
def _dump_stacks_on_signal() -> None:
    faulthandler.register(signal.SIGUSR2, file=sys.stderr if _report_files is None else _report_files[1])


def _handles_sigusr2(process: int) -> bool:
    """Whether a process has a handler for SIGUSR2; the signal would kill it otherwise."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)


@cache
def lower_worker_priority(workers: int) -> bool:
    """Raises the niceness of this worker if the node has fewer cores than training processes; returns whether it did.

    A rank that waits for a core delays all other ranks, while samples are prefetched. With enough cores nothing is
    changed, since other jobs on the node would get priority too.

    Args:
        workers: dataloader workers per rank; the launcher sets the number of ranks (LOCAL_WORLD_SIZE).
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(os.sched_getaffinity(0)) >= ranks * (1 + workers):
        return False
    os.nice(_NICENESS)
    return True
