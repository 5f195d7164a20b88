"""Saves and stops a training after the current step when a signal arrives."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.runtime import outcome
from finetune.runtime.processes import any_rank_died
from finetune.utils.errors import NotSavedError, UserError

logger = logging.getLogger(__name__)


class StoppedError(UserError):
    """The training was stopped by a signal, and has saved its state."""

    exit_code = outcome.STOPPED


class StopCallback(TrainerCallback):
    """Saves and ends the training after the step in which any rank got a signal.

    The ranks share the request through the reduction that ``TrainingChecks`` makes in every step; a rank whose
    peers have died cannot finish it, and does not save.

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
