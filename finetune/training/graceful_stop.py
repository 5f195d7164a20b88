"""The end of a training before its last step: asked for by a signal, or because nothing moves any more."""

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
from finetune.runtime.processes import a_rank_has_died
from finetune.utils.errors import NotSavedError, UserError

logger = logging.getLogger(__name__)

STACKS = "hang"
"""Folder in OUTPUT_DIR with the stacks of every rank of a run that stood still."""

# Seconds between two looks at the clock, those that the other ranks get to write theirs, and those after which a
# process ends that does not even let the thread run.
_LOOK_EVERY = 1.0
_GATHER = 5.0
_LAST_RESORT = 15.0


class StoppedError(UserError):
    """The training was asked to stop, and has saved its state."""

    exit_code = outcome.STOPPED


class StopCallback(TrainerCallback):
    """Saves and ends the training at the end of a step at which any rank was asked to stop.

    The ranks agree by the sum that the alarms make at every step: a rank whose peers have died waits for it in vain and
    never saves.

    Args:
        seconds: that finishing the step and saving may take.
        asked: whether a rank was asked to stop, the same on all ranks.
    """

    def __init__(self, seconds: float, asked: Callable[[], bool]) -> None:
        self._seconds = seconds
        self._asked = asked
        self._on_start = False

    def __enter__(self) -> StopCallback:
        return self

    def __exit__(self, *error: object) -> None:
        """From here on the last checkpoint is all there is."""
        outcome.watch.cannot_save()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to save; an evaluation that a stop left out is made up for."""
        outcome.watch.can_save(self._seconds, a_rank_has_died)
        self._on_start = args.eval_on_start
        args.eval_on_start = self._on_start or _evaluation_left_out(args, state)

    def on_epoch_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """The flag is as it was given."""
        args.eval_on_start = self._on_start

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lets the Trainer save after this step and go no further."""
        if self._asked():
            logger.info("asked to stop: saving after step %d", state.global_step)
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True
            args.load_best_model_at_end = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that was cut short is not evaluated, and what is saved is not saved again."""
        if self._asked():
            control.should_evaluate = control.should_save = False

    def check(self, args: TrainingArguments, state: TrainerState, missing: str | None = None) -> None:
        """Called when the training has ended, for whatever reason.

        Args:
            args: of the run.
            state: of the Trainer.
            missing: why there is no checkpoint of the last step; None where there is.

        Raises:
            StoppedError: it was asked for.
            NotSavedError: it was asked for, and the state could not be saved.
        """
        if not self._asked():
            return
        outcome.watch.saved()
        if missing is not None:
            raise NotSavedError(f"stopped as asked at step {state.global_step} of {state.max_steps}, but {missing}")
        saved = f"step {state.global_step} of {state.max_steps} is saved in {args.output_dir}/checkpoint-"
        how = "--resume_from_checkpoint auto goes on from there"
        if args.save_only_model:
            how = "of its weights only (--save_only_model true): a new run can start from them, this one cannot go on"
        raise StoppedError(f"stopped as asked: {saved}{state.global_step}; {how}")


def _evaluation_left_out(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the checkpoint that is gone on from was saved by a stop at a step after which to evaluate."""
    if not state.global_step or state.global_step < args.eval_delay:
        return False
    if args.eval_strategy == IntervalStrategy.STEPS:
        due = state.global_step % state.eval_steps == 0
    else:
        due = args.eval_strategy == IntervalStrategy.EPOCH and math.isclose(state.epoch or 0, round(state.epoch or 0))
    return due and not any(entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history)


class HangWatch(TrainerCallback):
    """Ends a run in which no micro-batch, evaluation batch or save was finished for too long.

    Every rank first writes the stacks of all its threads and of its loader processes, and the samples of the step, into
    ``STACKS``. A thread sees to it; should it not run either, because C code holds the interpreter, the stacks are
    written by ``faulthandler`` and the process ends all the same.

    Args:
        seconds: without any progress; 0 for no watch.
        samples: names of the samples of the step so far.
    """

    def __init__(self, seconds: float, samples: Callable[[], list[str]]) -> None:
        self._seconds = seconds
        self._samples = samples
        self._last: float | None = None
        self._step = 0
        self._folder = Path()

    def progress(self) -> None:
        """Something was finished."""
        if self._last is not None:
            self._last = time.monotonic()
            # Not sys.stderr, which may be something without a file.
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
            # One rank that stands still makes all others wait; the first to notice calls them.
            if silent > self._seconds or (silent > _LOOK_EVERY and self._called()):
                self._end(silent)
            time.sleep(_LOOK_EVERY)

    def _called(self) -> bool:
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
            f"What every rank was doing, and the samples of the step, are in {folder}"
        )
        outcome.end_now(outcome.FAILED, message)
