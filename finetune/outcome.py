"""How a run ends: exit codes, the machine-readable last line, signals, and the way out.

A program imports this before torch: exit handlers run in reverse order, so that the one here runs last.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from finetune.errors import UserError

OK = 0
FAILED = 1
USER_ERROR = 2
NOT_VERIFIED = 3
# WorthlessError: nothing was trained, or what came out is of no use.
WORTHLESS = 4
# Training went on to its end, but a checkpoint or the result could not be written (disk full, read-only).
NOT_SAVED = 5
# Asked to stop by a signal, and saved: --resume_from_checkpoint auto goes on (75 is EX_TEMPFAIL: start it again).
STOPPED = 75
INTERRUPTED = 130

# The exit status that ``leave`` was given.
_leaving: int | None = None


def plain_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with null where a number is not finite: NaN and Infinity are no JSON."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def mean_train_loss(history: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean training loss over all logged steps that were finite, those before a resume included; None without any."""
    total, steps, last = 0.0, 0, 0
    for entry in history:
        if "loss" in entry:
            if math.isfinite(entry["loss"]):
                total += entry["loss"] * (entry["step"] - last)
                steps += entry["step"] - last
            last = entry["step"]
    return total / steps if steps else None


def last_eval_loss(history: Iterable[Mapping[str, Any]]) -> float | None:
    """The latest evaluation loss; None when nothing was evaluated."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return losses[-1] if losses else None


def distinct_lines(path: Path) -> int:
    """How many different lines a file has: every process of a run may note the same record. 0 without the file."""
    return len(set(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else 0


def report(status: str, **fields: Any) -> None:
    """Prints the last line of a run, ``result={...}``, on rank 0; other ranks print nothing."""
    if _is_main_process():
        result = plain_numbers({"status": status, **fields})
        # In one write: a launcher's other processes share this stream.
        sys.stdout.write("result=" + json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()


def message_of(error: UserError) -> str:
    """What the user reads; an error raised in a loader process carries that process' traceback in front of it."""
    message = str(error)
    return message.rpartition("Error: ")[2] if message.startswith("Caught ") else message


def leave(status: int) -> NoReturn:
    """Ends the process: threads are waited for and exit handlers run as always, but nothing behind them does.

    torch 2.15.0 can abort while its C++ objects are destroyed after a distributed run; a launcher would then take work
    that is done and saved for failed.
    """
    global _leaving
    _leaving = status
    sys.exit(status)


@atexit.register
def _leave() -> None:
    if _leaving is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_leaving)


def install() -> None:
    """From here on every end of this process has its message, its last line and its exit code."""
    sys.excepthook = _excepthook
    _watch_sigterm()


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    global _leaving
    if isinstance(error, KeyboardInterrupt):
        _interrupted("interrupted")
    traceback.print_exception(kind, error, trace)
    report("error", exit_code=FAILED, message=f"{kind.__name__}: {error}")
    _leaving = FAILED


def _interrupted(message: str) -> None:
    if _is_main_process():
        sys.stderr.write(f"{message}; --resume_from_checkpoint auto continues from the last checkpoint\n")
    report("interrupted", exit_code=INTERRUPTED, message=message)
    sys.stderr.flush()
    # Loader processes and collectives that wait for dead ranks would hold a normal exit up.
    os._exit(INTERRUPTED)


def _watch_sigterm() -> None:
    """Ends the process at once when it is told to, even while its main thread waits inside a collective.

    A Python handler runs only once the main thread is back in Python; torchrun would wait 30 seconds for that.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    owner = os.getpid()

    def watch() -> None:
        while True:
            if signal.SIGTERM in os.read(reader, 1):
                _interrupted("ended by SIGTERM (the job was stopped, or another process of the run failed)")

    def ignore(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a loader process, made by fork, has no thread that watches
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, ignore)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True, name="sigterm").start()
