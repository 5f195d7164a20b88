"""Which checkpoint a run continues from, and whether it can."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.arguments import TrainingArguments
from finetune.errors import UserError
from finetune.models.modes import saved_with
from finetune.tuning.manifest import Manifest, checkpoints, describe, fault, read

logger = logging.getLogger(__name__)


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


def choose_checkpoint(training: TrainingArguments, output: Path, downsample_mode: str | None = None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint stands for, checked; None to start from the base.

    Only one process should call this: it reads every byte of the checkpoint.

    Args:
        training: flags of the run.
        output: its folder.
        downsample_mode: of the run, None for a family without.

    Raises:
        ResumeError: a path that is no complete checkpoint, or a checkpoint that does not fit this run.
    """
    wish = training.resume_from_checkpoint
    if wish is None:
        return None
    if wish == "auto":
        return _newest(training, output, downsample_mode)
    folder = Path(wish).expanduser().absolute()
    if not folder.is_dir():
        raise ResumeError(
            f"--resume_from_checkpoint {wish}: no such folder; give OUTPUT_DIR/checkpoint-N, auto or none"
        )
    manifest = read(folder)
    if (reason := fault(folder, manifest)) is not None:
        inside = checkpoints(folder)
        hint = f"give one of its checkpoints, e.g. {inside[-1][1]}" if inside else "auto takes the newest complete one"
        raise ResumeError(f"{folder} is not a complete checkpoint, {reason}. --resume_from_checkpoint: {hint}")
    assert manifest is not None
    _check_fits(training, folder, manifest, downsample_mode)
    logger.info("resuming from %s (step %d)", folder, manifest.step)
    return folder


def _newest(training: TrainingArguments, output: Path, mode: str | None) -> Path | None:
    """The complete checkpoint written last; unfinished and damaged ones are named and passed over."""
    found = [(folder, read(folder)) for _, folder in checkpoints(output)]
    found.sort(key=lambda entry: entry[1].written if entry[1] else float("inf"), reverse=True)
    for folder, manifest in found:
        if (reason := fault(folder, manifest)) is not None:
            logger.warning("%s is not complete and is passed over: %s", folder, reason)
            continue
        assert manifest is not None
        _check_fits(training, folder, manifest, mode)
        logger.info("resuming from %s (step %d)", folder, manifest.step)
        return folder
    _check_nothing_is_lost(output)
    logger.info("no complete checkpoint in %s: starting from the base", output)
    return None


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
    if manifest.world_size != now.world_size and now.zero_stage > 0:
        raise ResumeError(
            f"{folder} was written by {manifest.world_size} processes, this run has {now.world_size}: with ZeRO each "
            f"process holds a part of the optimizer's state. Start {manifest.world_size} processes (GPUS_PER_NODE, "
            f"NNODES). {weights}"
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
