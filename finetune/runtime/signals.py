"""Signals: a process that trains finishes its step and saves; any other ends at once, whatever it waits for."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

# What schedulers and people send to end a job: kill, SLURM's --signal=USR1, a terminal that is closed.
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Seconds that Ctrl-C has to reach Python code; a main thread that waits inside a collective never gets there.
_PATIENCE = 5.0
# And that a process has which does not even let its other threads run.
_LAST_RESORT = 10


class SignalWatch:
    """Takes the signals of this process, in a thread that works while the main thread waits inside C code.

    A Python handler runs only once the main thread is back in Python; torchrun would wait 30 seconds for that.

    Args:
        end: ends the process at once, with a message.
    """

    def __init__(self, end: Callable[[str], object]) -> None:
        self._end = end
        self._grace: float | None = None
        self._failed: Callable[[], bool] = lambda: False
        self._deadline: float | None = None
        self._request: str | None = None
        self._leaving = False
        self._late = ""

    @property
    def request(self) -> str | None:
        """Name of the signal that asked this process to save and stop, None while there was none."""
        return self._request

    def can_save(self, seconds: float, failed: Callable[[], bool]) -> None:
        """From here on a request lets the process finish its step and save, and ends it when that takes too long.

        Args:
            seconds: that this may take.
            failed: whether another process of the run has died: then there is nothing to wait for.
        """
        self._failed = failed
        self._grace = seconds

    def cannot_save(self) -> None:
        """From here on a request ends the process at once, as it did before ``can_save``."""
        self._grace = None

    def saved(self) -> None:
        """Everything is saved: the process is about to end and passes over further requests."""
        self._leaving, self._deadline = True, None
        signal.alarm(_LAST_RESORT)

    def install(self) -> None:
        """Takes the signals over. One that is ignored (nohup) stays so."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def note(number: int, frame: object) -> None:
            """Loader processes, made by fork, pass over it: they end with their rank."""

        for request in _REQUESTS:
            if signal.getsignal(request) != signal.SIG_IGN:
                signal.signal(request, note)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # What a loader process, made by fork, is sent is not for this one.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._run, args=(reader,), daemon=True, name="signals").start()

    def _run(self, reader: int) -> None:
        while True:
            left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            if not select.select([reader], [], [], left)[0] and not self._leaving:
                self._end(self._late)
            for number in os.read(reader, 64):
                if number == signal.SIGINT:
                    self._wait(_PATIENCE, "interrupted")
                elif number in _REQUESTS:
                    self._asked(signal.Signals(number).name)

    def _asked(self, name: str) -> None:
        if self._leaving:
            return
        if self._failed():
            self._end("ended, as another process of the run has died")
        if self._request is not None:
            return  # schedulers send a signal to the launcher, which passes it on, and to every process besides
        if self._grace is None:
            self._end(f"ended by {name}")
        else:
            self._request = name
            self._wait(self._grace, f"ended by {name}: {self._grace:g} seconds (--save_on_signal_timeout) were over "
                       "before the step was finished and saved")  # fmt: skip
            signal.alarm(int(self._grace) + _LAST_RESORT)

    def _wait(self, seconds: float, message: str) -> None:
        if self._deadline is None:
            self._deadline, self._late = time.monotonic() + seconds, message
