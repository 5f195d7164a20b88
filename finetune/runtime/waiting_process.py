"""``WaitingProcess``: a process forked right after the imports, which later runs one command without repeating them."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from finetune.runtime.processes import end_with_parent

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class WaitingProcess:
    """Runs one command in a process that has this one's imports and nothing else of it.

    It ends with this process. Not for a process that has used a GPU: CUDA does not survive a fork.

    Args:
        run: takes the words of the command and returns its exit status.
    """

    def __init__(self, run: Callable[[Sequence[str]], int]) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        reader, self._writer = os.pipe()
        self._process = os.fork()
        if not self._process:
            os.close(self._writer)
            _serve(reader, run)
        os.close(reader)

    def call(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
        """Runs the command; may be called once.

        Args:
            words: of the command.
            folder: the working directory.
            environment: all environment variables of the command.

        Returns:
            The exit status; 128 + N where signal N ended the process.
        """
        order = json.dumps([list(words), str(folder), dict(environment)])
        with os.fdopen(self._writer, "w", encoding="ascii") as pipe:
            pipe.write(order + "\n")
        _, status = os.waitpid(self._process, 0)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def _serve(reader: int, run: Callable[[Sequence[str]], int]) -> NoReturn:
    """Waits for the command, runs it and ends; a pipe that closes without a command ends it as well."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that will give the command
    status = 1
    try:
        end_with_parent(os.getppid())
        with os.fdopen(reader, encoding="ascii") as pipe:
            order = pipe.readline()  # not to its end: dataloader workers keep the other side open
        if order:
            words, folder, environment = json.loads(order)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            status = run(words)
    except SystemExit as error:  # argparse
        status = error.code if isinstance(error.code, int) else 1
    finally:  # never back into the code of the process it was forked from
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
