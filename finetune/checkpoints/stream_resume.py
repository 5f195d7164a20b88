"""Resumes a streamed run: checks that records are assigned to ranks and workers as before, and counts those seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from finetune.checkpoints.resume import ResumeError

NAME = "stream.json"
"""File of a checkpoint of a streamed run."""


def assignment(state: str, args: transformers.TrainingArguments) -> dict[str, Any]:
    """Everything that decides which records a run has seen after a number of steps.

    Args:
        state: description of the stream.
        args: of the run.
    """
    return {
        "data, seed and buffer_size": state,
        "processes": args.world_size,
        "dataloader_num_workers": args.dataloader_num_workers,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }


def write(folder: Path, now: dict[str, Any]) -> None:
    """Writes the assignment of records into a checkpoint."""
    (folder / NAME).write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def batches_seen(folder: Path, now: dict[str, Any] | None) -> int:
    """Batches per rank that the run of a checkpoint has seen; 0 for data that is not streamed.

    Args:
        folder: the checkpoint.
        now: the assignment of this run; None if its data is not streamed.

    Raises:
        ResumeError: only one of the runs is streamed, or their assignments differ.
    """
    file = folder / NAME
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if (before is None) != (now is None):
        was, now_is = ("was not", "is") if before is None else ("was", "is not")
        raise ResumeError(
            f"{folder}: the run {was} streamed and this one {now_is}: the records that it has seen are unknown. Use "
            f"--streaming {str(before is not None).lower()}, or start a new run"
        )
    if before is None or now is None:
        return 0
    changed = [f"{name} {before.get(name)} (now {value})" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ResumeError(
            f"{folder}: its records were assigned to ranks and workers with {', '.join(changed)}: a resumed stream "
            "would repeat some records and skip others. Use the values the run was started with, or start a new run"
        )
    step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
    return step * now["gradient_accumulation_steps"]
