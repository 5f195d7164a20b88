"""Ends a training that hangs, with the stack traces of every rank (--hang_timeout); nothing is saved."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.media import worker_process
from finetune.runtime import outcome

STACKS = "hang"
"""Folder in OUTPUT_DIR with the stack traces of every rank of a hanging run."""

# Seconds between checks; that the other ranks have to write their stacks; until faulthandler ends a process whose
# threads do not run.
_POLL_SECONDS = 1.0
_GATHER = 5.0
_LAST_RESORT = 15.0


class HangCallback(TrainerCallback):
    """Ends a run in which no micro-batch, evaluation batch or save was finished for too long.

    Every rank first writes the stacks of all its threads and of its dataloader workers, and the samples of the step,
    into ``STACKS``. This is done by a thread; if it cannot run because C code holds the GIL, ``faulthandler`` writes
    the stacks and ends the process.

    Args:
        seconds: time without progress after which the run is ended; 0 never ends it.
        samples: names of the samples of the step so far.
    """

    def __init__(self, seconds: float, samples: Callable[[], list[str]]) -> None:
        self._seconds = seconds
        self._samples = samples
        self._last: float | None = None
        self._step = 0
        self._folder = Path()

    def progress(self) -> None:
        """Notes that something was finished."""
        if self._last is not None:
            self._last = time.monotonic()
            # Not sys.stderr, which may have no file descriptor.
            faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT, exit=True, file=sys.__stderr__ or 2)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the watch."""
        if self._seconds:
            self._folder = Path(args.output_dir or ".") / STACKS
            self._last = time.monotonic()
            self.progress()
            threading.Thread(target=self._run, daemon=True, name="hang").start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the step."""
        self._step = state.global_step + 1
        self.progress()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """A micro-batch is finished."""
        self.progress()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is finished."""
        self.progress()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """A batch of the evaluation is finished."""
        self.progress()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """An evaluation is finished."""
        self.progress()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint is written."""
        self.progress()

    def __enter__(self) -> HangCallback:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the watch."""
        self._last = None
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while (last := self._last) is not None:
            silent = time.monotonic() - last
            # One hanging rank makes all others wait; the first to notice makes the folder that the others look for.
            if silent > self._seconds or (silent > _POLL_SECONDS and self._other_rank_ends()):
                self._end(silent)
            time.sleep(_POLL_SECONDS)

    def _other_rank_ends(self) -> bool:
        return (self._folder / f"step-{self._step}").is_dir()

    def _end(self, silent: float) -> None:
        folder = self._folder / f"step-{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        rank = os.environ.get("RANK", "0")
        with (folder / f"rank-{rank}.txt").open("w", encoding="utf-8") as file:
            file.write(f"rank {rank}, step {self._step}: nothing was finished for {silent:.0f} seconds\n")
            file.write("samples of the step so far: " + ("; ".join(self._samples()) or "none") + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n" + worker_process.worker_report())
        time.sleep(_GATHER)
        message = (
            f"step {self._step}: nothing was finished for {silent:.0f} seconds (--hang_timeout {self._seconds:g}). "
            f"The stack traces of every rank, and the samples of the step, are in {folder}"
        )
        outcome.exit_now(outcome.FAILED, message)
