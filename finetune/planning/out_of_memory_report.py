"""The error message of a run out of GPU memory: where it failed, how much was missing, and flags with which it fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.manifest import checkpoints, read
from finetune.families import detect
from finetune.planning.memory_estimate import MemoryEstimate, MemoryEstimator
from finetune.planning.memory_remedies import Remedy, changes_of, remedies
from finetune.planning.meta_model import adapt_meta_model, quiet
from finetune.planning.recompute_choice import SHARE, setup_of
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.runtime.out_of_memory import (
    Allocation,
    OutOfMemoryError,
    gigabytes,
    is_out_of_memory,
    tell,
    told_by_first,
)

# Records named in a message.
_NAMED = 8


class OutOfMemoryReport:
    """Turns an out-of-memory error inside its context into one that says what to do.

    Args:
        config: config.json of the checkpoint.
        training: flags of the run.
        lora: its adapters.
        measured: returns its largest micro-batch; called only if needed.
    """

    def __init__(
        self,
        config: dict[str, Any],
        training: TrainingArguments,
        lora: LoraArguments,
        measured: Callable[[], SampleShape],
    ) -> None:
        self._config, self._training, self._lora, self._measured = config, training, lora, measured
        self._trainer: Any = None

    def watch(self, trainer: Any) -> None:
        """From here on errors are those of this trainer; before, the model is being loaded."""
        self._trainer = trainer

    def __enter__(self) -> OutOfMemoryReport:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises the error that says what to do.

        Raises:
            OutOfMemoryError: the context ended with an error of GPU memory.
        """
        if error is None or not is_out_of_memory(error):
            return
        if (message := told_by_first()) is None:
            message = self._explain(Allocation.of(error))
            tell(message)
        raise OutOfMemoryError(message) from error

    def _explain(self, allocation: Allocation) -> str:
        figures = f": {allocation}" if str(allocation) else ""
        lines = [f"out of GPU memory on rank {os.environ.get('RANK', '0')} {self._where()}{figures}{self._records()}"]
        if self._trainer is not None and not self._trainer.model.training:
            return "\n".join([*lines, *_evaluation_flags(self._training)])
        if allocation.fragmented:
            lines.append(
                f"  {allocation.setting} in the environment: torch held {gigabytes(allocation.unused or 0)} that were "
                "free, in pieces"
            )
        try:
            lines += self._flags(allocation)
        except (RuntimeError, LookupError, TypeError, ValueError) as failed:
            # The error of the run must not be lost to one of its estimate.
            lines.append(f"  python -m finetune plan lists settings that fit (here: {type(failed).__name__}: {failed})")
        return "\n".join([*lines, f"  {_resuming(self._training)}"])

    def _where(self) -> str:
        if self._trainer is None:
            return "while the model was loaded"
        step, steps = self._trainer.state.global_step + 1, self._trainer.state.max_steps
        if not self._trainer.model.training:
            return f"in the evaluation after step {step - 1}"
        return f"in step {step} of {steps}"

    def _records(self) -> str:
        names = [] if self._trainer is None else self._trainer.checks.current()
        if not names:
            return ""
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"; records: {'; '.join(names[:_NAMED])}{more}"

    def _flags(self, allocation: Allocation) -> list[str]:
        """The flags with which a step fits, as lines."""
        if (available := allocation.available or _memory(self._training)) is None:
            return ["  python -m finetune plan lists settings that fit"]
        with quiet():
            setup, shape = self._setup(), self._measured()
            estimate = _Estimates(self._config, self._training, self._lora)
            now = estimate(setup, shape).total
            # What was in use is known: where the estimate of these flags is lower, those of others are, too.
            needed = available - (allocation.free or 0) + (allocation.asked or 0)
            limit = available * SHARE / max(needed / now, 1)
            changes = changes_of(self._training, setup, shape, detect(self._config).parts)
            found, fits = remedies(estimate, changes, setup, shape, limit)
        if not found:
            return ["  no flag saves memory here: a larger GPU, or a smaller model"]
        saved = _saved_step(self._training)
        said = f"estimated for {shape.batch} x {shape.tokens} tokens on a GPU with {gigabytes(available)}"
        head = "fit, the cheapest first" if fits else "save most, but nothing is estimated to fit"
        return [f"  flags that {head} ({said}; now {gigabytes(now)}):", *(_line(remedy, saved) for remedy in found)]

    def _setup(self) -> TrainingSetup:
        training = self._training
        parts = tuple(training.checkpoint_parts) if training.checkpoint_parts else None
        on = bool(training.gradient_checkpointing)
        vision = bool(training.tune_vision) or "vision" in (training.lora_parts or ())
        return replace(
            setup_of(self._config, training, self._lora),
            checkpointing=on,
            checkpoint_parts=parts if on else None,
            tune_vision=vision,
        )


class _Estimates:
    """Estimates for the parameters that the run trains; the model differs by the dtype of what trains."""

    def __init__(self, config: dict[str, Any], training: TrainingArguments, lora: LoraArguments) -> None:
        self._config, self._training, self._lora = config, training, lora
        self._known: dict[bool, MemoryEstimator] = {}

    def __call__(self, setup: TrainingSetup, shape: SampleShape) -> MemoryEstimate:
        if setup.master_weights not in self._known:
            dtype = getattr(torch, self._training.compute_dtype)
            model = adapt_meta_model(self._config, self._training, self._lora, setup, dtype)
            self._known[setup.master_weights] = MemoryEstimator(self._config, dtype, model=model)
        return self._known[setup.master_weights].memory(setup, shape)


def _line(remedy: Remedy, saved: int | None) -> str:
    """Flags with their estimate, and whether the checkpoint of step ``saved`` cannot be resumed with them."""
    host = f" and {gigabytes(remedy.memory.host)} of CPU memory" if remedy.memory.host else ""
    anew = "" if remedy.resumes or saved is None else f"; a new run, not from checkpoint-{saved}"
    return f"    {remedy.flags}   ({gigabytes(remedy.memory.total)}{host}{anew})"


def _memory(training: TrainingArguments) -> int | None:
    """Memory of this process' GPU; None without one."""
    if training.device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(training.device).total_memory


def _evaluation_flags(training: TrainingArguments) -> list[str]:
    """Flags that save memory in an evaluation, which no estimate covers."""
    flags = []
    if (batch := training.per_device_eval_batch_size) > 1:
        flags.append(f"--per_device_eval_batch_size {batch // 2}")
    if training.eval_generate:
        flags.append(f"--eval_max_new_tokens {max(training.eval_max_new_tokens // 2, 1)}")
    flags.append("--eval_strategy no, and python -m finetune evaluate afterwards")
    return [
        "  flags that save memory there, the cheapest first:",
        *(f"    {each}" for each in flags),
        f"  {_resuming(training)}",
    ]


def _resuming(training: TrainingArguments) -> str:
    """Where a run with other flags continues."""
    if (step := _saved_step(training)) is not None:
        return f"add --resume_from_checkpoint auto to continue from checkpoint-{step}"
    return "no checkpoint is saved yet: --resume_from_checkpoint auto starts from the base, in the same folder"


def _saved_step(training: TrainingArguments) -> int | None:
    """Step of the newest checkpoint that can be resumed; None without one."""
    output = Path(training.output_dir or "output")
    known = [(step, read(folder)) for step, folder in checkpoints(output)] if output.is_dir() else []
    steps = [step for step, manifest in known if manifest is not None and manifest.resumable]
    return steps[-1] if steps else None
