"""Writes checkpoints and results, removes old checkpoints, and handles failures to write on any rank."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.background_manifest import BackgroundManifest
from finetune.checkpoints.disk_space import (
    RecordingWriter,
    SpaceError,
    check_space,
    check_writable,
    checkpoint_size,
    describe_space,
    free_space,
    write_fault,
    written_size,
)
from finetune.checkpoints.manifest import Manifest, checkpoints, describe, mark_doubtful, read
from finetune.checkpoints.run_identity import RunIdentity
from finetune.checkpoints.saving import move_result
from finetune.checkpoints.universal_checkpoint import is_converted
from finetune.model_folders.output_contents import STATE_FOLDER
from finetune.models.finite_weights import nonfinite_weights
from finetune.models.strict_loading import some
from finetune.runtime import distributed
from finetune.utils.errors import NotSavedError, UnusableResultError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from finetune.checkpoints.output_folder import OutputFolder
    from finetune.training.training_checks import TrainingChecks

logger = logging.getLogger(__name__)

# Folder in STATE_FOLDER for a result that is being written.
_UNFINISHED = "result"


class UnsavedError(Exception):
    """A checkpoint or result could not be written; raised on every rank."""


class CheckpointManager(TrainerCallback):
    """Writes checkpoints with their manifests and removes those beyond ``save_total_limit``.

    A checkpoint is written only if the last step and the weights are finite. If it cannot be written, it is removed
    with a warning, and training continues. Old checkpoints are removed here, because the Trainer would remove them
    before the new one is complete: never the best or the newest one, and only after a step from the new weights was
    finite. The manifest is written in the background: training goes on meanwhile.

    Args:
        identity: of the run; needed on rank 0 only.
        completed: called with the folder of a complete checkpoint, in another thread; on rank 0 only.
    """

    def __init__(self, identity: RunIdentity | None = None, completed: Callable[[Path], None] | None = None) -> None:
        self._manifest = BackgroundManifest(completed)
        self._rotation_due = False
        self.identity = identity or RunIdentity()
        self.unsaved: str | None = None
        self._not_saved: tuple[int, str] | None = None
        self._output: OutputFolder | None = None
        self._converted: Path | None = None
        self._unconfirmed: Path | None = None
        self._limit: int | None = None
        self.size: int | None = None
        self._checks: TrainingChecks | None = None

    def begin(
        self,
        args: TrainingArguments,
        model: nn.Module,
        checks: TrainingChecks,
        resumed: Path | None,
        output: OutputFolder | None = None,
    ) -> None:
        """Called before training: disables the Trainer's rotation of checkpoints, and checks the disk space.

        Raises:
            SpaceError: the disk has no space for a single checkpoint.
        """
        self._converted = resumed if resumed is not None and is_converted(resumed) else None
        self._checks, self._output = checks, output
        self._unconfirmed = None if self._converted else resumed
        self._limit, args.save_total_limit = args.save_total_limit, None
        self.size = checkpoint_size(model, args)
        message = None
        if distributed.is_main_process() and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            try:
                check_space(Path(args.output_dir or "output"), self.size, self._limit and self._limit + 1)
            except SpaceError as error:
                message = str(error)
        if (message := distributed.from_main_process(message)) is not None:
            raise SpaceError(message)

    def end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Called after training, also after an error: restores the flag; marks a checkpoint as doubtful if no step from
        its weights was finite.
        """
        args.save_total_limit = self._limit
        if not state.is_world_process_zero:
            return
        self._complete(state)
        if self._converted is not None:
            shutil.rmtree(self._converted.parent, ignore_errors=True)
        if self._unconfirmed is not None and self._checks is not None and self._checks.in_a_row:
            try:
                mark_doubtful(self._unconfirmed, f"none of the {self._checks.in_a_row} steps after it was finite")
                logger.warning(
                    "%s: none of the steps after it was finite; --resume_from_checkpoint auto skips it",
                    self._unconfirmed,
                )
            except OSError as error:
                logger.warning("%s: %s", self._unconfirmed, write_fault(error))
        else:
            self._rotate(args, state)

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes save, eval and logging steps of a resumed run from the flags; the Trainer uses the checkpoint's."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes old checkpoints once the newest is complete and a step from its weights was finite."""
        if self._unconfirmed is not None and self._checks is not None and not self._checks.in_a_row:
            self._unconfirmed, self._rotation_due = None, state.is_world_process_zero
        if not self._manifest.busy:
            self._rotate_if_due(args, state)

    def final_error(self, args: transformers.TrainingArguments) -> UserError | None:
        """The error of a run whose result is saved: non-finite last steps, or a checkpoint that was not written."""
        if self._checks is not None and (error := self._checks.final_error()) is not None:
            return error
        if self.unsaved is not None:
            return NotSavedError(f"the result is saved in {args.output_dir}, but {self.unsaved}")
        return None

    def why_not_saved(self, step: int) -> str | None:
        """Why the checkpoint of a step was not written; None if there was no error."""
        return self._not_saved[1] if self._not_saved is not None and self._not_saved[0] == step else None

    def save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        accelerator: Accelerator,
        model: nn.Module,
        write_all: Callable[[], None],
    ) -> None:
        """Writes a checkpoint of the current step if the weights are finite.

        Every rank must call it; success or failure is the same on all ranks.

        Args:
            args: of the run.
            state: of the Trainer.
            accelerator: of the Trainer.
            model: the unwrapped model.
            write_all: writes all files but the manifest.
        """
        folder = Path(args.output_dir or "output") / f"checkpoint-{state.global_step}"
        if (reason := self._nonfinite_reason(accelerator, model, lora=args.use_lora)) is not None:
            self._not_saved = state.global_step, f"no {folder.name} is written: {reason}"
            self._warn(state, "%s", self._not_saved[1])
            return
        self._complete(state)
        self._rotate_if_due(args, state)  # before the new checkpoint, of which no step is known yet
        best, main = state.best_model_checkpoint, state.is_world_process_zero
        try:
            raise_if_any_failed(accelerator, write_failure(lambda: self._check_writable(folder)) if main else None)
            raise_if_any_failed(accelerator, self._write(accelerator, write_all))
        except UnsavedError as error:
            if state.best_model_checkpoint == str(folder):
                state.best_model_checkpoint = best
            self._give_up(state, folder, error)
            return
        self.unsaved, self._unconfirmed = None, folder
        if main:
            self.size = written_size(folder)
            fields = {**describe(args), **self.identity.manifest_fields()}
            self._manifest.start(folder, state.global_step, fields)

    def _give_up(self, state: TrainerState, folder: Path, error: UnsavedError) -> None:
        """Notes a checkpoint that could not be written, and removes what there is of it."""
        self.unsaved = f"{folder} could not be written: {error} ({describe_space(folder.parent, self.size)})"
        if state.is_world_process_zero:
            shutil.rmtree(folder, ignore_errors=True)
        self._not_saved = state.global_step, self.unsaved
        self._warn(state, "%s. Training continues until the next save", self.unsaved)

    def save_result(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        model: nn.Module,
        folder: Path,
        write_weights: Callable[[Path], None],
    ) -> None:
        """Writes a result to a temporary folder and moves it into place when it is complete; every rank must call it.

        Args:
            args: of the run.
            accelerator: of the Trainer.
            model: the unwrapped model.
            folder: target folder.
            write_weights: writes all files of the result into a folder.

        Raises:
            UnusableResultError: weights are not finite; nothing is written.
            NotSavedError: it could not be written; a previous result is unchanged.
        """
        check_finite(accelerator, model, lora=args.use_lora, output=folder)
        unfinished = folder / STATE_FOLDER / _UNFINISHED
        if args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        try:
            write_weights(unfinished)
            ours = [] if self._output is None or not args.should_save else self._output.written
            move = partial(move_result, unfinished, folder, ours)
            raise_if_any_failed(accelerator, write_failure(move) if args.should_save else None)
        except UnsavedError as error:
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise NotSavedError(
                f"the result could not be written: {error} ({describe_space(folder, self.size)}). Free disk space and "
                "resume from the last checkpoint with --resume_from_checkpoint auto"
            ) from None

    def _nonfinite_reason(self, accelerator: Accelerator, model: nn.Module, *, lora: bool) -> str | None:
        """Why the weights should not be saved; the same on every rank; None if they are finite."""
        if self._checks is not None and self._checks.in_a_row:
            return f"the last {self._checks.in_a_row} steps were not finite"
        if names := nonfinite_on_any_rank(accelerator, model, lora=lora):
            return f"weights are not finite: {some(names)}"
        return None

    def _write(self, accelerator: Accelerator, write_all: Callable[[], None]) -> str | None:
        """Writes the files of this rank; returns the error message, or None."""
        writer = _recording_writer(accelerator)
        if writer is not None:
            writer.faults.clear()
        fault = write_failure(write_all, alone=accelerator.num_processes == 1)
        return fault or (writer.faults[0] if writer is not None and writer.faults else None)

    def _check_writable(self, folder: Path) -> None:
        """Checks that the folder is writable and has space, before any rank writes to it."""
        if self._output is not None:
            self._output.add(folder.name)
        check_writable(folder)
        free = free_space(folder)
        if self.size is not None and free is not None and free < self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _complete(self, state: TrainerState) -> None:
        """Waits for the manifest of the last checkpoint."""
        if (fault := self._manifest.wait()) is not None:
            self.unsaved = fault
            self._warn(state, "%s. Training continues until the next save", fault)

    def _rotate_if_due(self, args: transformers.TrainingArguments, state: TrainerState) -> None:
        if self._rotation_due:
            self._rotation_due = False
            self._complete(state)
            self._rotate(args, state)

    def _rotate(self, args: transformers.TrainingArguments, state: TrainerState) -> None:
        if self._limit is not None and self._limit > 0:
            rotate(Path(args.output_dir or "output"), self._limit, self.identity.run, state.best_model_checkpoint)

    def _warn(self, state: TrainerState, text: str, *values: Any) -> None:
        if state.is_world_process_zero:
            logger.warning("step %d: " + text, state.global_step, *values)


def rotate(output: Path, limit: int, run: str, best: str | None) -> None:
    """Removes the oldest checkpoints of a run until ``limit`` are left; age is by start of the run and step, not time.

    Incomplete ones are removed first, then doubtful ones; never the best one or the newest good one. Checkpoints of
    other runs are kept.
    """
    found: list[tuple[bool, bool, tuple[int, int], Path, Manifest | None]] = []
    for step, folder in checkpoints(output):
        manifest = read(folder)
        if manifest is None or manifest.run in (run, ""):
            age = manifest.age if manifest else (0, step)
            found.append((manifest is not None, not (manifest and manifest.doubt), age, folder, manifest))
    found.sort(key=lambda entry: entry[:4])
    surplus = max(len(found) - limit, 0)
    kept = {Path(best or "").name, found[-1][3].name if found else ""}
    for *_, folder, _ in [entry for entry in found if entry[3].name not in kept][:surplus]:
        shutil.rmtree(folder, ignore_errors=True)


def write_failure(work: Callable[[], object], *, alone: bool = True) -> str | None:
    """Calls a function that writes files; returns the message of an error of writing, None on success.

    Args:
        work: the function.
        alone: whether no other rank waits for this one inside ``work``.

    Raises:
        NotSavedError: writing failed inside DeepSpeed, where the other ranks wait for this one.
    """
    try:
        work()
    except (OSError, RuntimeError, SafetensorError, UnsavedError) as error:
        fault = str(error) if isinstance(error, UnsavedError) else write_fault(error)
        if fault is None:
            raise
        frames = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
        if not alone and "save_checkpoint" in frames:
            raise NotSavedError(f"the checkpoint could not be written: {fault}") from error
        return fault
    return None


def raise_if_any_failed(accelerator: Accelerator, fault: str | None) -> None:
    """Raises on every rank if any of them failed to write.

    Raises:
        UnsavedError: with the messages of all ranks.
    """
    flag = torch.tensor([float(fault is not None)], device=accelerator.device)
    total = accelerator.reduce(flag, reduction="sum")
    assert isinstance(total, torch.Tensor)
    if total.item():
        faults = gather_object([fault] if fault is not None else [])
        raise UnsavedError("; ".join(dict.fromkeys(faults)))


def nonfinite_on_any_rank(accelerator: Accelerator, model: nn.Module, *, lora: bool) -> list[str]:
    """Names of the weights to be saved that are not finite on any rank; the same list on every rank."""
    own = nonfinite_weights(model, trained_only=lora)
    flag = torch.tensor([float(len(own))], device=accelerator.device)
    total = accelerator.reduce(flag, reduction="sum")
    assert isinstance(total, torch.Tensor)
    return list(dict.fromkeys(gather_object(own))) if total.item() else []


def check_finite(accelerator: Accelerator, model: nn.Module, *, lora: bool, output: Path) -> None:
    """Checks the weights of a result before they are saved.

    Raises:
        UnusableResultError: some are not finite.
    """
    if names := nonfinite_on_any_rank(accelerator, model, lora=lora):
        manifests = ((folder, read(folder)) for _, folder in checkpoints(output))
        good = [folder for folder, manifest in manifests if manifest is not None and not manifest.doubt]
        hint = f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"
        raise UnusableResultError(
            f"weights are not finite: {some(names)}. The result is not saved; {hint}. Likely "
            "causes: a learning rate that is too high, fp16 (--bf16 true if the GPU supports it), a damaged base"
        )


def _recording_writer(accelerator: Accelerator) -> RecordingWriter | None:
    """Wraps the checkpoint writer of DeepSpeed's engine to record errors; None without DeepSpeed."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None or wrapped.engine.checkpoint_engine.is_decoupled():
        return None
    engine = wrapped.engine
    if not isinstance(engine.checkpoint_engine, RecordingWriter):
        engine.checkpoint_engine = RecordingWriter(engine.checkpoint_engine)
    return engine.checkpoint_engine
