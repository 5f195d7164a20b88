"""Stops a training before its last step: save and stop on a signal, or end a hanging run with stack traces."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.media import worker_process
from finetune.runtime import outcome
from finetune.runtime.processes import any_rank_died
from finetune.utils.errors import NotSavedError, UserError

logger = logging.getLogger(__name__)

STACKS = "hang"
"""Folder in OUTPUT_DIR with the stack traces of every rank of a hanging run."""

# Seconds between checks; that the other ranks have to write their stacks; until faulthandler ends a process whose
# threads do not run.
_POLL_SECONDS = 1.0
_GATHER = 5.0
_LAST_RESORT = 15.0


class StoppedError(UserError):
    """The training was stopped by a signal, and has saved its state."""

    exit_code = outcome.STOPPED


class StopCallback(TrainerCallback):
    """Saves and ends the training after the step in which any rank got a signal.

    The ranks share the request through the reduction that the watchdog makes in every step; a rank whose peers have
    died cannot finish it, and does not save.

    Args:
        seconds: time limit for finishing the step and saving.
        requested: whether any rank got a signal; the same on all ranks.
    """

    def __init__(self, seconds: float, requested: Callable[[], bool]) -> None:
        self._seconds = seconds
        self._requested = requested
        self._eval_on_start = False

    def __enter__(self) -> StopCallback:
        return self

    def __exit__(self, *error: object) -> None:
        """A signal ends the process at once from here on."""
        outcome.watch.cannot_save()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A signal saves and stops from here on; evaluates first if the stop skipped a due evaluation."""
        outcome.watch.can_save(self._seconds, any_rank_died)
        self._eval_on_start = args.eval_on_start
        args.eval_on_start = self._eval_on_start or _evaluation_skipped(args, state)

    def on_epoch_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """Restores the flag."""
        args.eval_on_start = self._eval_on_start

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Has the Trainer save after this step and stop."""
        if self._requested():
            logger.info("stop requested: saving after step %d", state.global_step)
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True
            args.load_best_model_at_end = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Does not evaluate an incomplete epoch, and does not save again."""
        if self._requested():
            control.should_evaluate = control.should_save = False

    def check(self, args: TrainingArguments, state: TrainerState, missing: str | None = None) -> None:
        """Called when the training has ended, for whatever reason.

        Args:
            args: of the run.
            state: of the Trainer.
            missing: why there is no checkpoint of the last step; None if there is one.

        Raises:
            StoppedError: a stop was requested.
            NotSavedError: a stop was requested, and the state could not be saved.
        """
        if not self._requested():
            return
        outcome.watch.saved()
        if missing is not None:
            raise NotSavedError(f"stopped by a signal at step {state.global_step} of {state.max_steps}, but {missing}")
        saved = f"step {state.global_step} of {state.max_steps} is saved in {args.output_dir}/checkpoint-"
        how = "--resume_from_checkpoint auto continues from there"
        if args.save_only_model:
            how = "its weights only (--save_only_model true): a new run can start from them, this one cannot be resumed"
        raise StoppedError(f"stopped by a signal: {saved}{state.global_step}; {how}")


def _evaluation_skipped(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the resumed checkpoint was saved by a stop that skipped the evaluation due at its step."""
    if not state.global_step or state.global_step < args.eval_delay:
        return False
    if args.eval_strategy == IntervalStrategy.STEPS:
        due = state.global_step % state.eval_steps == 0
    else:
        due = args.eval_strategy == IntervalStrategy.EPOCH and math.isclose(state.epoch or 0, round(state.epoch or 0))
    return due and not any(entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history)


class HangWatch(TrainerCallback):
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

    def __enter__(self) -> HangWatch:
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
