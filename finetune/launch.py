"""Launcher: torchrun with the exit status of the run, forwarded signals and cleanup of temporary files.

``python -m finetune.launch [options of torchrun] -- finetune.py [flags]``. Beyond torchrun:

- flags, model folder and data format are checked before any process starts, without importing torch;
- it exits with the status of the run (see ``finetune.runtime.outcome``) instead of always 1;
- SIGUSR1 is passed on to the ranks like SIGTERM, and they get the time they ask for to save;
- without GPUs the ranks are forked from this process, which has imported what they need: every rank would import it;
- the ranks keep temporary files in a folder of the run, which is removed with it; the folder of a run whose launcher
  was killed too is removed when the next run starts.
"""

from __future__ import annotations

import argparse
import fcntl
import getpass
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from finetune.early_check import check_early
from finetune.runtime import outcome
from finetune.runtime.imports import TRAINING_MODULES, collect_rarely, import_at_start
from finetune.runtime.processes import ABOVE, PROCESSES, RUN_FOLDER
from finetune.utils.errors import UserError, silence_unactionable_warnings

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# Ranks end by themselves after --save_on_signal_timeout; torchrun kills those that do not after this many seconds.
_SHUTDOWN_TIMEOUT = 6 * 3600
_SCRIPT = "finetune.py"
_PREFIX = "finetune-run-"
_LOCK = "lock"
# The second is what every ZeRO engine imports when it starts; it brings the compiler of torch.
_DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
# The path of a multiprocessing socket below a longer temporary folder would exceed the limit of the system.
_LONGEST_PATH = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all ranks.

    Args:
        argv: options of torchrun, the program and its flags.

    Returns:
        The exit status of the run, 128 + N where signal N ended a rank.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if (flags := _training_flags(arguments)) is not None:
            check_early(flags)
    except UserError as error:
        message = outcome.print_error(error)
        outcome.report("error", exit_code=error.exit_code, message=message)
        return error.exit_code
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # before there are ranks: what ends those is another exception
        message = "interrupted before training started"
        sys.stderr.write(f"{message}\n")
        outcome.report("interrupted", exit_code=outcome.INTERRUPTED, message=message)
        return outcome.INTERRUPTED


def _training_flags(arguments: Sequence[str]) -> Sequence[str] | None:
    """The flags of finetune.py behind torchrun's options; None for another program, or if only --help is asked for."""
    script = next((place for place, word in enumerate(arguments) if Path(word).name == _SCRIPT), None)
    if script is None or {"-h", "--help", "--help_all"} & set(arguments[script + 1 :]):
        return None
    return arguments[script + 1 :]


def _run(arguments: Sequence[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(list(arguments))
    options.signals_to_handle = _SIGNALS
    options.shutdown_timeout = _SHUTDOWN_TIMEOUT
    silence_unactionable_warnings()
    # torchrun's table of failures and its traceback add nothing to our result line.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if _can_fork(options):
        _prepare_fork(options)
    with run_folder() as folder:
        try:
            run.run(options)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _status_of(rank, failure.pid, failure.exitcode)
        except SignalException as error:
            return _result(folder) or 128 + error.sigval
    return outcome.OK


def _can_fork(options: argparse.Namespace) -> bool:
    """Whether the ranks can be forked: CUDA survives no fork, and neither do threads of OpenMP."""
    import torch

    another_program = options.module or options.no_python or Path(options.training_script).name != _SCRIPT
    return not another_program and not torch.accelerator.is_available() and os.environ.get("OMP_NUM_THREADS") == "1"


def _prepare_fork(options: argparse.Namespace) -> None:
    """Imports what training needs and has torchrun fork this process for every rank."""
    sys.path.insert(0, str(Path(options.training_script).resolve().parent))  # as for a script that is started
    deepspeed = "--deepspeed" in options.training_script_args and os.environ.get("DS_ACCELERATOR") == "cpu"
    try:
        import_at_start(*TRAINING_MODULES, *(_DEEPSPEED if deepspeed else ()))
    except ImportError:  # the ranks meet it too, and report it
        return
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(write_through=True)  # as python -u, by which torchrun starts ranks
    launcher = os.getpid()
    os.register_at_fork(after_in_child=lambda: _reset_signals() if os.getppid() == launcher else None)
    options.run_path, options.start_method = True, "fork"


def _reset_signals() -> None:
    """Python's own handlers, instead of those with which torchrun ends its ranks."""
    for name in _SIGNALS.split(","):
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _status_of(rank: int, pid: int, code: int) -> int:
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    cause = "; memory may have run out (dmesg)" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"rank {rank} (process {pid}) was ended by {name}{cause}, and the run with it\n")
    return 128 - code


def _result(folder: Path) -> int | None:
    """The exit status reported by rank 0; None without one, as on other nodes."""
    path = folder / outcome.RESULT
    return json.loads(path.read_text(encoding="utf-8"))["exit_code"] if path.is_file() else None


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for the temporary files of the ranks, removed afterwards.

    This process holds its lock: a folder whose lock is free belongs to a dead run.
    """
    root = Path(tempfile.gettempdir())
    for previous in root.glob(f"{_PREFIX}*"):
        _remove_if_dead(previous)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.environ[RUN_FOLDER] = str(folder)
    os.environ[ABOVE] = str(os.getpid())
    # The cache of compiled kernels is shared by all runs.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / f"torchinductor_{_user()}"))
    if len(str(folder)) <= _LONGEST_PATH:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _remove_if_dead(folder: Path) -> None:
    try:
        lock = (folder / _LOCK).open("r+")
    except OSError:  # of another user, or being made or removed just now
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
    else:
        _remove(folder, lock)


def _remove(folder: Path, lock: IO[str]) -> None:
    for process in (folder / PROCESSES).glob("*"):
        # Tensors sent by dataloader workers stay there until their rank has received them.
        for left in Path("/dev/shm").glob(f"torch_{process.name}_*"):  # noqa: S108 - where the C library puts them
            left.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for this user id
        return str(os.getuid())


if __name__ == "__main__":
    collect_rarely()
    sys.exit(main())
