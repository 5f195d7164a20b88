"""Chooses and checks the checkpoint that a run resumes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.manifest import Manifest, checkpoints, describe, fault, read
from finetune.checkpoints.resumable import why_not_resumable
from finetune.checkpoints.resume_rules import compare
from finetune.checkpoints.run_identity import RunIdentity
from finetune.model_folders.downsample_mode import saved_with
from finetune.model_folders.duplex_prompt import prompt_of
from finetune.utils.errors import UserError

logger = logging.getLogger(__name__)

# The ZeRO stage that shards the weights; see ``universal_checkpoint``.
_SHARDED = 3


class ResumeError(UserError):
    """A checkpoint that this run cannot resume from."""


class NoStepsLeftError(Exception):
    """The resumed checkpoint already has all steps of the run."""


class NoStepsLeftCallback(TrainerCallback):
    """Stops a resumed run that has no steps left; the Trainer checks for the end only after a step."""

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when weights and optimizer of the checkpoint are loaded."""
        if state.global_step >= state.max_steps:
            raise NoStepsLeftError


def choose_checkpoint(
    training: TrainingArguments, output: Path, now: RunIdentity | None = None, downsample_mode: str | None = None
) -> Path | None:
    """The checkpoint for --resume_from_checkpoint, checked; None to start from the base.

    Only one process should call this: it reads every byte of the checkpoint.

    Args:
        training: flags of the run.
        output: its output folder.
        now: identity of this run; it takes the id of the resumed run. None compares the flags of batches and ZeRO only.
        downsample_mode: of the run, None for a family without one.

    Raises:
        ResumeError: a path without a complete checkpoint, or a checkpoint that this run cannot resume from.
        ForeignCodeError: a file of the checkpoint may run code when it is unpickled.
    """
    wish = training.resume_from_checkpoint
    if wish is None:
        return None
    found = _newest(output) if wish == "auto" else _named(wish)
    if found is None:
        _check_no_result(output)
        if output.is_dir():  # not on the first start
            logger.info("no complete checkpoint in %s: starting from the base", output)
        return None
    folder, manifest = found
    now = now or RunIdentity()
    _check_fits(training, folder, manifest, downsample_mode)
    _compare(folder, manifest, now)
    known = (read(path) for _, path in checkpoints(output))
    now.continue_run(manifest, [each.attempt for each in known if each is not None and each.run == manifest.run])
    logger.info("resuming from %s (step %d)", folder, manifest.step)
    return folder


def _named(wish: str) -> tuple[Path, Manifest]:
    """The checkpoint of a path."""
    folder = Path(wish).expanduser().absolute()
    if not folder.is_dir():
        raise ResumeError(
            f"--resume_from_checkpoint {wish}: no such folder; give OUTPUT_DIR/checkpoint-N, auto or none"
        )
    manifest = read(folder)
    reason = fault(folder, manifest)
    if manifest is None or reason is not None:
        inside = checkpoints(folder)
        hint = f"give one of its checkpoints, e.g. {inside[-1][1]}" if inside else "auto takes the newest complete one"
        raise ResumeError(f"{folder} is not a complete checkpoint, {reason}. --resume_from_checkpoint: {hint}")
    # ``_check_fits`` has the message for checkpoints saved without optimizer state (--save_only_model).
    if manifest.resumable and (reason := why_not_resumable(folder, manifest)) is not None:
        raise ResumeError(
            f"cannot resume from {folder}: {reason}. Give another checkpoint. {_weights_hint(folder, manifest)}"
        )
    return folder, manifest


def _newest(output: Path) -> tuple[Path, Manifest] | None:
    """The newest resumable checkpoint of the folder's run; skipped ones are logged.

    Newest: the highest step of the latest start of the run that saved anything, independent of clocks.

    Raises:
        ResumeError: there are complete checkpoints, but none is resumable.
    """
    found = [(folder, read(folder)) for _, folder in checkpoints(output)]
    run = _run_of(found)
    damaged = None
    found.sort(key=lambda entry: (entry[1] is None, entry[1].age if entry[1] else (0, 0)), reverse=True)
    for folder, manifest in found:
        if manifest is not None and manifest.run not in (run, ""):
            logger.warning("%s is of another run and is skipped: give its path to resume from it", folder)
        elif (reason := fault(folder, manifest)) is not None:
            logger.warning("%s is not complete and is skipped: %s", folder, reason)
        elif manifest is not None and manifest.resumable and (reason := why_not_resumable(folder, manifest)):
            logger.warning("%s is not resumable and is skipped: %s", folder, reason)
            damaged = damaged or f"{folder}: {reason}"
        elif manifest is not None:
            return folder, manifest
    if damaged is not None:
        raise ResumeError(
            f"no checkpoint in {output} is resumable ({damaged}): start a new run with another --output_dir, or "
            "replace them with --resume_from_checkpoint none --overwrite_output_dir true"
        )
    return None


def _run_of(found: list[tuple[Path, Manifest | None]]) -> str:
    """The run id of an output folder: that of the checkpoint with the highest step."""
    known = [manifest for _, manifest in found if manifest is not None]
    return max(known, key=lambda manifest: (manifest.run != "", manifest.step)).run if known else ""


def _compare(folder: Path, manifest: Manifest, now: RunIdentity) -> None:
    """Logs how this run differs from that of the checkpoint.

    Raises:
        ResumeError: a difference that is refused.
    """
    if not manifest.run:
        logger.warning("%s was written by an older version: its base, data and flags are not compared", folder)
        return
    found = compare(manifest, now)
    level = logging.WARNING if found.affects_training else logging.INFO
    logger.log(level, "%s and this run:\n%s", folder, found)
    if found.refused:
        other_base = manifest.base.get("digest") != now.base.get("digest")
        hint = "" if other_base else f" {_weights_hint(folder, manifest)}"
        raise ResumeError(
            f"cannot resume from {folder} with the flags and files of this run: {'; '.join(found.refused)}. Use those "
            f"that it was started with.{hint}"
        )


def _check_no_result(output: Path) -> None:
    """Checks that a run without a checkpoint does not replace a finished result.

    Raises:
        ResumeError: there is one.
    """
    for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
        if (output / name).exists():
            raise ResumeError(
                f"OUTPUT_DIR {output} holds a finished result ({name}) but no checkpoint to resume from: choose "
                "another folder, or replace it with --resume_from_checkpoint none --overwrite_output_dir true"
            )


def _check_fits(training: TrainingArguments, folder: Path, manifest: Manifest, mode: str | None) -> None:
    """Checks that this run can load the training state of a complete checkpoint.

    Raises:
        ResumeError: it cannot.
    """
    now = Manifest(step=0, written=0.0, files={}, **describe(training))
    weights = _weights_hint(folder, manifest)
    if not manifest.resumable:
        raise ResumeError(
            f"{folder} holds the weights only (--save_only_model true), not the optimizer state: it cannot be "
            f"resumed. {weights}"
        )
    if manifest.method != now.method:
        raise ResumeError(
            f"{folder} is of a {manifest.method} run, this is a {now.method} run; use the launcher it was started with"
        )
    if manifest.zero_stage != now.zero_stage:
        raise ResumeError(
            f"{folder} was written with {_zero(manifest.zero_stage)}, this run uses {_zero(now.zero_stage)}: the "
            f"optimizer state cannot be loaded. Use the DS_CONFIG it was started with. {weights}"
        )
    if manifest.world_size != now.world_size and now.zero_stage == _SHARDED:
        raise ResumeError(
            f"{folder} was written by {manifest.world_size} processes, this run has {now.world_size}: the ZeRO-3 "
            f"optimizer state cannot be restored for another number of processes (that of ZeRO-2 can). Start "
            f"{manifest.world_size} processes (GPUS_PER_NODE, NNODES). {weights}"
        )
    if (saved := saved_with(folder)) not in (None, mode):
        raise ResumeError(
            f"{folder} was trained with downsample_mode {saved}, this run has {mode}: give --downsample_mode {saved}. "
            f"{weights}"
        )
    prompt_of(folder)  # refuses records of another version of minicpm-o5-sdk
    _warn_of_order(folder, manifest, now)


def _warn_of_order(folder: Path, manifest: Manifest, now: Manifest) -> None:
    """Warns where the rest of the epoch consists of other samples than it would have without the interruption."""
    before, after = _global_batch(manifest), _global_batch(now)
    if before != after or manifest.world_size != now.world_size:
        logger.warning(
            "%s: the global batch was %s, now it is %s; samples will not be seen exactly once per epoch",
            folder,
            before,
            after,
        )
    if manifest.order and manifest.order != now.order:
        logger.warning(
            "%s: batches were made with %s, now it is %s; samples will not be seen exactly once per epoch",
            folder,
            manifest.order,
            now.order,
        )


def _weights_hint(folder: Path, manifest: Manifest) -> str:
    if manifest.method == "lora":
        return f"Or start a new run from its weights: --lora_weight_path {folder}"
    return f"Or start a new run from its weights: MODEL={folder} and another OUTPUT_DIR"


def _zero(stage: int) -> str:
    return f"ZeRO-{stage}" if stage else "no ZeRO"


def _global_batch(manifest: Manifest) -> str:
    batch, world, steps = manifest.batch_size, manifest.world_size, manifest.accumulation
    return f"{batch * world * steps} = {batch} per device x {world} processes x {steps} accumulation"
