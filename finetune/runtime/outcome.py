"""How a process ends: exit codes, the ``result=`` line, error messages once for all ranks, excepthook, signal handlers.

A program imports this before torch: exit handlers run in reverse order, so that the one here runs last.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from finetune.runtime.processes import RUN_FOLDER, any_rank_died, end_children, end_with_launcher
from finetune.runtime.signals import SignalWatch
from finetune.utils.errors import UserError
from finetune.utils.json_objects import nonfinite_as_null

OK = 0
FAILED = 1
USER_ERROR = 2
NOT_VERIFIED = 3
# UnusableResultError: nothing was trained, or the result is unusable.
UNUSABLE_RESULT = 4
# Training finished, but a checkpoint or the result could not be written (disk full, read-only).
NOT_SAVED = 5
# OutOfMemoryError: the memory of a GPU does not suffice.
OUT_OF_MEMORY = 6
# Stopped by a signal, and saved: --resume_from_checkpoint auto continues (75 is EX_TEMPFAIL).
STOPPED = 75
INTERRUPTED = 130

RESULT = "result.json"
"""The last line of rank 0, in the launcher's folder for the run."""
# The first error that a rank printed, there.
_ERROR = "error.json"

# The exit status that ``exit_after_handlers`` was given.
_leaving: int | None = None
# Called before the process ends.
_cleanups: list[Callable[[], object]] = []


def report(status: str, **fields: Any) -> None:
    """Prints the last line of a run, ``result={...}``, with 6 significant digits; on rank 0 alone."""
    if _is_main_process():
        rounded = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in fields.items()}
        fields = nonfinite_as_null({"status": status, **rounded})
        result = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        if (folder := os.environ.get(RUN_FOLDER)) is not None:
            (Path(folder) / RESULT).write_text(result, encoding="utf-8")
        if sys.stdout.isatty() and sys.stderr.isatty() and "message" in fields:  # where it has just been printed
            result = json.dumps({key: value for key, value in fields.items() if key != "message"}, ensure_ascii=False)
        # In one write: a launcher's other processes share this stream.
        sys.stdout.write(f"result={result}\n")
        sys.stdout.flush()


def message_of(error: UserError) -> str:
    """The message of an error, without the traceback that a dataloader worker puts in front of it."""
    message = str(error)
    return message.rpartition("Error: ")[2].rstrip() if message.startswith("Caught ") else message


def exit_after_handlers(status: int) -> NoReturn:
    """Ends the process after its threads and exit handlers, without destroying C++ objects.

    torch 2.15.0 can abort while its C++ objects are destroyed after a distributed run; a launcher would then report a
    run that is complete and saved as failed.
    """
    global _leaving
    _leaving = status
    end_children()
    if multiprocessing.parent_process() is not None:  # forked by the launcher: exit handlers do not run there
        _clean_up()
    sys.exit(status)


@atexit.register
def _leave() -> None:
    if _leaving is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        _end(_leaving)


def install_exit_handlers() -> None:
    """Installs excepthook and signal handlers, so that every exit has its message, result line and exit code."""
    sys.excepthook = _excepthook
    end_with_launcher()
    watch.install()


class ReportedErrors:
    """Within, an error that nobody handles ends this process with its message and its result line.

    As the excepthook does, which torchrun does not call in ranks that it forks.
    """

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and error is not None and not isinstance(error, SystemExit):
            _excepthook(kind, error, trace)
            exit_after_handlers(FAILED)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    global _leaving
    if isinstance(error, KeyboardInterrupt):
        _interrupted("interrupted")
    if isinstance(error, RuntimeError) and any_rank_died():
        # The collective failed because of the other process, which has reported the cause.
        exit_now(FAILED, "ended, as another process of the run has died: see its message")
    traceback.print_exception(kind, error, trace)
    report("error", exit_code=FAILED, message=f"{kind.__name__}: {error}")
    end_children()
    _leaving = FAILED


def _interrupted(message: str) -> NoReturn:
    exit_now(INTERRUPTED, message, "; --resume_from_checkpoint auto continues from the last checkpoint")


def exit_now(status: int, message: str, advice: str = "") -> NoReturn:
    """Ends the process without waiting for dataloader workers or for collectives with dead ranks.

    If another rank has ended with an error, that error is the result of the run.

    Args:
        status: exit status.
        message: for the result line and, followed by ``advice``, for stderr.
        advice: the remedy.
    """
    if (printed := _printed_elsewhere()) is not None:
        status, message = printed["exit_code"], printed["message"]
    elif _is_main_process():
        sys.stderr.write(f"{message}{advice}\n")
    report("interrupted" if status == INTERRUPTED else "error", exit_code=status, message=message)
    sys.stderr.flush()
    _end(status)


def print_error(error: UserError) -> str:
    """Prints the message of an error, once for all ranks of the machine that have the same; returns it."""
    message = message_of(error)
    if _is_first(message):
        title = "" if error.exit_code == STOPPED else "error: "
        sys.stderr.write(f"{title}{message}\n")
        if (folder := os.environ.get(RUN_FOLDER)) is not None:
            printed = json.dumps({"exit_code": error.exit_code, "message": message})
            (Path(folder) / _ERROR).write_text(printed, encoding="utf-8")
    return message


def _printed_elsewhere() -> dict[str, Any] | None:
    """The error of a rank that has ended, and this process with it."""
    path = Path(os.environ.get(RUN_FOLDER, ""), _ERROR)
    return json.loads(path.read_text(encoding="utf-8")) if any_rank_died() and path.is_file() else None


def _is_first(message: str) -> bool:
    if (folder := os.environ.get(RUN_FOLDER)) is None:
        return True
    marker = Path(folder) / f"said-{hashlib.sha256(message.encode(errors='replace')).hexdigest()[:16]}"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def register_cleanup(cleanup: Callable[[], object]) -> None:
    """Registers a function to be called when this process ends, except by SIGKILL or a crash in C code."""
    _cleanups.append(cleanup)


def _end(status: int) -> NoReturn:
    _clean_up()
    os._exit(status)


def _clean_up() -> None:
    while _cleanups:
        _cleanups.pop()()


watch = SignalWatch(_interrupted)
"""Handles the signals of this process, from ``install_exit_handlers`` on."""
