"""Signal handling: SIGTERM, SIGUSR1 and SIGHUP save and stop a training process, and end any other at once."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

# Sent to end a job: kill, SLURM's --signal=USR1, a closed terminal.
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Seconds that Ctrl-C has to raise KeyboardInterrupt; a main thread inside a collective never returns to Python.
_INTERRUPT_SECONDS = 5.0
# More seconds until SIGALRM ends a process whose other threads do not run either.
_LAST_RESORT = 10


class SignalWatch:
    """Handles the signals of this process in a thread, which runs while the main thread waits inside C code.

    A Python signal handler runs only once the main thread is back in Python; torchrun waits 30 seconds for that.

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
        """Name of the signal that requested a save and stop; None before."""
        return self._request

    def can_save(self, seconds: float, failed: Callable[[], bool]) -> None:
        """From here on a signal requests a save and stop, and ends the process when that takes too long.

        Args:
            seconds: time limit for finishing the step and saving.
            failed: whether another process of the run has died; then the process ends at once.
        """
        self._failed = failed
        self._grace = seconds

    def cannot_save(self) -> None:
        """From here on a signal ends the process at once, as before ``can_save``."""
        self._grace = None

    def saved(self) -> None:
        """Everything is saved and the process is about to end: further signals are ignored."""
        self._leaving, self._deadline = True, None
        signal.alarm(_LAST_RESORT)

    def install(self) -> None:
        """Installs the handlers. An ignored signal (nohup) stays ignored."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def note(number: int, frame: object) -> None:
            """Does nothing; also in forked dataloader workers, which end with their rank."""

        for request in _REQUESTS:
            if signal.getsignal(request) != signal.SIG_IGN:
                signal.signal(request, note)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # Signals sent to a forked dataloader worker are not for this process.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._run, args=(reader,), daemon=True, name="signals").start()

    def _run(self, reader: int) -> None:
        while True:
            left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            if not select.select([reader], [], [], left)[0] and not self._leaving:
                self._end(self._late)
            for number in os.read(reader, 64):
                if number == signal.SIGINT:
                    self._wait(_INTERRUPT_SECONDS, "interrupted")
                elif number in _REQUESTS:
                    self._asked(signal.Signals(number).name)

    def _asked(self, name: str) -> None:
        if self._leaving:
            return
        if self._failed():
            self._end("ended, as another process of the run has died")
        if self._request is not None:
            return  # schedulers signal the launcher, which forwards it, and every process as well
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
