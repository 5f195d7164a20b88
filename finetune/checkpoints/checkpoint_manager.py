"""Saving checkpoints so that a good one is always left: what is written, what is removed, what a failure costs."""

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
from finetune.checkpoints.disk_space import (
    NotingWriter,
    SpaceError,
    check_space,
    checkpoint_size,
    describe_space,
    free_space,
    probe,
    write_fault,
    written_size,
)
from finetune.checkpoints.manifest import Manifest, cast_doubt, checkpoints, describe, read, write
from finetune.checkpoints.output_folder import RECORDS
from finetune.checkpoints.run_identity import RunIdentity
from finetune.checkpoints.saving import put_in_place
from finetune.checkpoints.universal_checkpoint import is_converted
from finetune.models.finite_weights import nonfinite_weights
from finetune.models.strict_loading import some
from finetune.runtime import distributed
from finetune.utils.errors import NotSavedError, UserError, WorthlessError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from finetune.checkpoints.output_folder import OutputFolder
    from finetune.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

# In the folder of records, where a result lies until all of it is written.
_UNFINISHED = "result"


class UnsavedError(Exception):
    """A checkpoint or result that could not be written; raised on every rank alike."""


class CheckpointManager(TrainerCallback):
    """Writes checkpoints with their manifests and removes those beyond ``save_total_limit``.

    A checkpoint is written only where the last step was finite and the weights are. One that cannot be written is
    removed, said, and training goes on to the next. The Trainer would remove older ones before the new one is
    complete, so that is done here: never the best, never the newest, and not before a step from the new weights was
    finite, which is the first sign that they are of use.

    Args:
        identity: of the run; only rank 0 needs it.
    """

    def __init__(self, identity: RunIdentity | None = None) -> None:
        self.identity = identity or RunIdentity()
        self.unsaved: str | None = None
        self._left_out: tuple[int, str] | None = None
        self._output: OutputFolder | None = None
        self._converted: Path | None = None
        self._unproven: Path | None = None
        self._limit: int | None = None
        self.size: int | None = None
        self._alarms: Watchdog | None = None

    def begin(
        self,
        args: TrainingArguments,
        model: nn.Module,
        alarms: Watchdog,
        resumed: Path | None,
        output: OutputFolder | None = None,
    ) -> None:
        """Before training: takes the removal of old checkpoints over, and looks whether there is space for them.

        Raises:
            SpaceError: there is no space for a single one.
        """
        self._converted = resumed if resumed is not None and is_converted(resumed) else None
        self._alarms, self._output = alarms, output
        self._unproven = None if self._converted else resumed
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
        """After training, well or not: gives the flag back, and doubts a checkpoint after which nothing was finite."""
        args.save_total_limit = self._limit
        if not state.is_world_process_zero:
            return
        if self._converted is not None:
            shutil.rmtree(self._converted.parent, ignore_errors=True)
        if self._unproven is not None and self._alarms is not None and self._alarms.in_a_row:
            try:
                cast_doubt(self._unproven, f"none of the {self._alarms.in_a_row} steps after it was finite")
                logger.warning("%s: none of the steps after it was finite; auto passes it over", self._unproven)
            except OSError as error:
                logger.warning("%s: %s", self._unproven, write_fault(error))
        else:
            self._rotate(args, state)

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the flags say when a resumed run saves, evaluates and logs: the Trainer takes it from the checkpoint."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A finite step from its weights: the newest checkpoint may replace older ones."""
        if self._unproven is not None and self._alarms is not None and not self._alarms.in_a_row:
            self._unproven = None
            if state.is_world_process_zero:
                self._rotate(args, state)

    def trouble(self, args: transformers.TrainingArguments) -> UserError | None:
        """What is wrong with a run that came to its end and whose result is saved."""
        if self._alarms is not None and (error := self._alarms.at_end()) is not None:
            return error
        if self.unsaved is not None:
            return NotSavedError(f"the result is saved in {args.output_dir}, but {self.unsaved}")
        return None

    def missing(self, step: int) -> str | None:
        """Why there is no checkpoint of a step that should have one; None where nothing went wrong with it."""
        return self._left_out[1] if self._left_out is not None and self._left_out[0] == step else None

    def save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        accelerator: Accelerator,
        model: nn.Module,
        write_all: Callable[[], None],
    ) -> None:
        """A checkpoint of the current step, if the weights are worth one and the disk takes it.

        Every rank must call it; they agree on what came out.

        Args:
            args: of the run.
            state: of the Trainer.
            accelerator: of the Trainer.
            model: the network, not wrapped.
            write_all: writes all files but the manifest.
        """
        folder = Path(args.output_dir or "output") / f"checkpoint-{state.global_step}"
        if (reason := self._unfit(accelerator, model, lora=args.use_lora)) is not None:
            self._left_out = state.global_step, f"no {folder.name} is written: {reason}"
            self._say(state, "%s", self._left_out[1])
            return
        best = state.best_model_checkpoint
        try:
            main = state.is_world_process_zero
            agree(accelerator, fault_of(lambda: self._make_room(folder)) if main else None)
            agree(accelerator, self._written(accelerator, write_all))
            agree(accelerator, fault_of(lambda: self._sign(folder, args, state)) if main else None)
        except UnsavedError as error:
            self.unsaved = f"{folder} could not be written: {error} ({describe_space(folder.parent, self.size)})"
            if state.best_model_checkpoint == str(folder):
                state.best_model_checkpoint = best
            if state.is_world_process_zero:
                shutil.rmtree(folder, ignore_errors=True)
            self._left_out = state.global_step, self.unsaved
            self._say(state, "%s. Training goes on to the next save", self.unsaved)
            return
        self.unsaved, self._unproven = None, folder

    def save_result(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        model: nn.Module,
        folder: Path,
        write_weights: Callable[[Path], None],
    ) -> None:
        """Puts a result in place at once, when it is finite and written in full; every rank must call it.

        Args:
            args: of the run.
            accelerator: of the Trainer.
            model: the network, not wrapped.
            folder: where it belongs.
            write_weights: writes all its files into a folder.

        Raises:
            WorthlessError: weights are not finite; nothing is written.
            NotSavedError: it could not be written; what was there before is still there.
        """
        check_finite(accelerator, model, lora=args.use_lora, output=folder)
        unfinished = folder / RECORDS / _UNFINISHED
        if args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        try:
            write_weights(unfinished)
            ours = [] if self._output is None or not args.should_save else self._output.written
            move = partial(put_in_place, unfinished, folder, ours)
            agree(accelerator, fault_of(move) if args.should_save else None)
        except UnsavedError as error:
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise NotSavedError(
                f"the result could not be written: {error} ({describe_space(folder, self.size)}). Make space and go on "
                "from the last checkpoint with --resume_from_checkpoint auto"
            ) from None

    def _unfit(self, accelerator: Accelerator, model: nn.Module, *, lora: bool) -> str | None:
        """Why no checkpoint should be made of the weights; the same on every rank."""
        if self._alarms is not None and self._alarms.in_a_row:
            return f"the last {self._alarms.in_a_row} steps were not finite"
        if names := agreed_nonfinite(accelerator, model, lora=lora):
            return f"weights are not finite: {some(names)}"
        return None

    def _written(self, accelerator: Accelerator, write_all: Callable[[], None]) -> str | None:
        """What kept this rank from writing its files; None when it has."""
        writer = _noting_writer(accelerator)
        if writer is not None:
            writer.faults.clear()
        fault = fault_of(write_all, alone=accelerator.num_processes == 1)
        return fault or (writer.faults[0] if writer is not None and writer.faults else None)

    def _make_room(self, folder: Path) -> None:
        """Looks whether the folder can be written and has space, before any rank begins to."""
        if self._output is not None:
            self._output.add(folder.name)
        probe(folder)
        free = free_space(folder)
        if self.size is not None and free is not None and free < self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sign(self, folder: Path, args: TrainingArguments, state: TrainerState) -> None:
        write(folder, state.global_step, {**describe(args), **self.identity.noted()})
        self.size = written_size(folder)

    def _rotate(self, args: transformers.TrainingArguments, state: TrainerState) -> None:
        if self._limit is not None and self._limit > 0:
            rotate(Path(args.output_dir or "output"), self._limit, self.identity.run, state.best_model_checkpoint)

    def _say(self, state: TrainerState, text: str, *values: Any) -> None:
        if state.is_world_process_zero:
            logger.warning("step %d: " + text, state.global_step, *values)


def rotate(output: Path, limit: int, run: str, best: str | None) -> None:
    """Removes checkpoints of a run until ``limit`` are left, by start and step of the run, whatever the clocks say.

    Unfinished ones go first, then doubtful ones; never the best, nor the newest that nothing is known against. Those
    of other runs are left alone.
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


def fault_of(work: Callable[[], object], *, alone: bool = True) -> str | None:
    """Does something that writes; what kept it from that, None when nothing did.

    Args:
        work: what is to be done.
        alone: whether no other rank waits for this one inside.

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


def agree(accelerator: Accelerator, fault: str | None) -> None:
    """Tells the ranks of each other's failures to write.

    Raises:
        UnsavedError: on every rank, if any of them failed.
    """
    flag = torch.tensor([float(fault is not None)], device=accelerator.device)
    total = accelerator.reduce(flag, reduction="sum")
    assert isinstance(total, torch.Tensor)
    if total.item():
        faults = gather_object([fault] if fault is not None else [])
        raise UnsavedError("; ".join(dict.fromkeys(faults)))


def agreed_nonfinite(accelerator: Accelerator, model: nn.Module, *, lora: bool) -> list[str]:
    """Names of weights that would be saved and are not finite, on any rank; the same on every rank."""
    own = nonfinite_weights(model, trained_only=lora)
    flag = torch.tensor([float(len(own))], device=accelerator.device)
    total = accelerator.reduce(flag, reduction="sum")
    assert isinstance(total, torch.Tensor)
    return list(dict.fromkeys(gather_object(own))) if total.item() else []


def check_finite(accelerator: Accelerator, model: nn.Module, *, lora: bool, output: Path) -> None:
    """Looks at the weights of a result before they are saved.

    Raises:
        WorthlessError: some are not finite.
    """
    if names := agreed_nonfinite(accelerator, model, lora=lora):
        read_ones = ((folder, read(folder)) for _, folder in checkpoints(output))
        left = [folder for folder, manifest in read_ones if manifest is not None and not manifest.doubt]
        hint = f"the last good checkpoint is {left[-1]}" if left else "there is no good checkpoint"
        raise WorthlessError(
            f"weights are not finite: {some(names)}. The result is not saved; {hint}. Likely "
            "causes: a learning rate that is too high, fp16 (--bf16 true where the GPU has it), a damaged base"
        )


def _noting_writer(accelerator: Accelerator) -> NotingWriter | None:
    """The writer of DeepSpeed's engine, made to note what fails; None without DeepSpeed."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None or wrapped.engine.checkpoint_engine.is_decoupled():
        return None
    engine = wrapped.engine
    if not isinstance(engine.checkpoint_engine, NotingWriter):
        engine.checkpoint_engine = NotingWriter(engine.checkpoint_engine)
    return engine.checkpoint_engine
