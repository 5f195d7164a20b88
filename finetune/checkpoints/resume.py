"""Which checkpoint a run continues from, and whether it can."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.manifest import Manifest, checkpoints, describe, fault, read
from finetune.checkpoints.resumable import unusable
from finetune.checkpoints.resume_rules import compare
from finetune.checkpoints.run_identity import RunIdentity
from finetune.models.downsample_mode import saved_with
from finetune.utils.errors import UserError

logger = logging.getLogger(__name__)

# The ZeRO stage in which no rank has whole weights; see ``universal``.
_SHARDED = 3


class ResumeError(UserError):
    """A checkpoint that this run cannot continue from."""


class NothingLeftError(Exception):
    """The checkpoint that was resumed from already has all steps of the run."""


class NothingLeftCallback(TrainerCallback):
    """Keeps a resumed run from training beyond its last step: the Trainer looks for the end only after a step."""

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when weights and optimizer of the checkpoint are loaded."""
        if state.global_step >= state.max_steps:
            raise NothingLeftError


def choose_checkpoint(
    training: TrainingArguments, output: Path, now: RunIdentity | None = None, downsample_mode: str | None = None
) -> Path | None:
    """The checkpoint that --resume_from_checkpoint stands for, checked; None to start from the base.

    Only one process should call this: it reads every byte of the checkpoint.

    Args:
        training: flags of the run.
        output: its folder.
        now: what the run is; it takes the id of the run that it goes on with. None compares the layout alone.
        downsample_mode: of the run, None for a family without.

    Raises:
        ResumeError: a path that is no complete checkpoint, or a checkpoint that does not fit this run.
        ForeignCodeError: a file of the checkpoint would run code when it is read.
    """
    wish = training.resume_from_checkpoint
    if wish is None:
        return None
    found = _newest(output) if wish == "auto" else _named(wish)
    if found is None:
        _check_nothing_is_lost(output)
        logger.info("no complete checkpoint in %s: starting from the base", output)
        return None
    folder, manifest = found
    now = now or RunIdentity()
    _check_fits(training, folder, manifest, downsample_mode)
    _compare(folder, manifest, now)
    known = (read(path) for _, path in checkpoints(output))
    now.go_on_from(manifest, [each.attempt for each in known if each is not None and each.run == manifest.run])
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
    # One that was saved on purpose without its state is told so by ``_check_fits``.
    if manifest.resumable and (reason := unusable(folder, manifest)) is not None:
        raise ResumeError(
            f"{folder} cannot be gone on from: {reason}. Name another checkpoint. {_weights_hint(folder, manifest)}"
        )
    return folder, manifest


def _newest(output: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of the folder's run that can be gone on from; those passed over are named.

    Newest is what the latest start of the run that saved anything got furthest with, whatever the clocks say.

    Raises:
        ResumeError: there are complete checkpoints, but none that can be gone on from.
    """
    found = [(folder, read(folder)) for _, folder in checkpoints(output)]
    run = _run_of(found)
    spoilt = None
    found.sort(key=lambda entry: (entry[1] is None, entry[1].age if entry[1] else (0, 0)), reverse=True)
    for folder, manifest in found:
        if manifest is not None and manifest.run not in (run, ""):
            logger.warning("%s is of another run and is passed over: name it to go on from it", folder)
        elif (reason := fault(folder, manifest)) is not None:
            logger.warning("%s is not complete and is passed over: %s", folder, reason)
        elif manifest is not None and manifest.resumable and (reason := unusable(folder, manifest)) is not None:
            logger.warning("%s cannot be gone on from and is passed over: %s", folder, reason)
            spoilt = spoilt or f"{folder}: {reason}"
        elif manifest is not None:
            return folder, manifest
    if spoilt is not None:
        raise ResumeError(
            f"no checkpoint in {output} can be gone on from ({spoilt}): start anew with another --output_dir, or "
            "replace them with --resume_from_checkpoint none --overwrite_output_dir true"
        )
    return None


def _run_of(found: list[tuple[Path, Manifest | None]]) -> str:
    """The id of the run that a folder is of: of the highest step, where checkpoints of several lie there."""
    known = [manifest for _, manifest in found if manifest is not None]
    return max(known, key=lambda manifest: (manifest.run != "", manifest.step)).run if known else ""


def _compare(folder: Path, manifest: Manifest, now: RunIdentity) -> None:
    """Says what goes on, what is taken over and what is not.

    Raises:
        ResumeError: something differs that cannot.
    """
    if not manifest.run:
        logger.warning("%s was written by an older version: its base, data and flags are not compared", folder)
        return
    found = compare(manifest, now)
    logger.log(logging.WARNING if found.felt else logging.INFO, "%s and this run:\n%s", folder, found)
    if found.refused:
        other_base = manifest.base.get("digest") != now.base.get("digest")
        hint = "" if other_base else f" {_weights_hint(folder, manifest)}"
        raise ResumeError(
            f"{folder} cannot be continued with what this run has: {'; '.join(found.refused)}. Give what it was "
            f"started with.{hint}"
        )


def _check_nothing_is_lost(output: Path) -> None:
    """Starting over must not replace a finished result."""
    for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
        if (output / name).exists():
            raise ResumeError(
                f"OUTPUT_DIR {output} holds a finished result ({name}) but no checkpoint to resume from: choose "
                "another folder, or replace it with --resume_from_checkpoint none --overwrite_output_dir true"
            )


def _check_fits(training: TrainingArguments, folder: Path, manifest: Manifest, mode: str | None) -> None:
    """Whether the state in a complete checkpoint can be continued by this run."""
    now = Manifest(step=0, written=0.0, files={}, **describe(training))
    weights = _weights_hint(folder, manifest)
    if not manifest.resumable:
        raise ResumeError(
            f"{folder} holds the weights only (--save_only_model true), not the state of the optimizer: it cannot be "
            f"resumed. {weights}"
        )
    if manifest.method != now.method:
        raise ResumeError(
            f"{folder} is of a {manifest.method} run, this is a {now.method} run; use the launcher it was started with"
        )
    if manifest.zero_stage != now.zero_stage:
        raise ResumeError(
            f"{folder} was written with {_zero(manifest.zero_stage)}, this run uses {_zero(now.zero_stage)}: the state "
            f"of the optimizer cannot be read. Use the DS_CONFIG it was started with. {weights}"
        )
    if manifest.world_size != now.world_size and now.zero_stage == _SHARDED:
        raise ResumeError(
            f"{folder} was written by {manifest.world_size} processes, this run has {now.world_size}: with ZeRO-3 each "
            f"process holds a part of the optimizer's state, which DeepSpeed does not restore rightly for another "
            f"number (with ZeRO-2 it does). Start {manifest.world_size} processes (GPUS_PER_NODE, NNODES). {weights}"
        )
    if (saved := saved_with(folder)) not in (None, mode):
        raise ResumeError(
            f"{folder} was trained with downsample_mode {saved}, this run has {mode}: give --downsample_mode {saved}. "
            f"{weights}"
        )
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
