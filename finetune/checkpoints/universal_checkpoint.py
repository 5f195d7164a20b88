"""Converts a ZeRO-1 or ZeRO-2 checkpoint for another number of processes, with DeepSpeed's universal checkpoints.

ZeRO-3 is not supported: when DeepSpeed 0.19.8 loads such a checkpoint, it gives all parameter groups the settings of
the first one and a common step counter, so that training would continue with wrong values.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.checkpoints.disk_space import describe_space, free_space, written_size
from finetune.checkpoints.manifest import NAME, read
from finetune.checkpoints.resumable import shards_folder
from finetune.checkpoints.resume import ResumeError
from finetune.model_folders.output_contents import STATE_FOLDER
from finetune.runtime import distributed

logger = logging.getLogger(__name__)

_FOLDER = "universal"
_LATEST = "latest_universal"
# Variables of the launcher, which the converter must not see.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def convert_for_world_size(checkpoint: Path | None, output: Path) -> Path | None:
    """The checkpoint, converted if this run has another number of processes.

    Only one process should call this.

    Args:
        checkpoint: complete and checked; None for none.
        output: folder of the run; the converted checkpoint is written below STATE_FOLDER in it.

    Raises:
        ResumeError: the disk has no space for it, or DeepSpeed cannot convert it.
    """
    made = output / STATE_FOLDER / _FOLDER
    shutil.rmtree(made, ignore_errors=True)  # of a run that was ended
    manifest = None if checkpoint is None else read(checkpoint)
    if checkpoint is None or manifest is None or not manifest.zero_stage:
        return checkpoint
    if manifest.world_size == distributed.world_size():
        return checkpoint
    shards = shards_folder(checkpoint)
    assert isinstance(shards, Path)
    needed, free = written_size(shards), free_space(output)
    if free is not None and free < needed:
        raise ResumeError(
            f"{checkpoint} was written by {manifest.world_size} processes and has to be converted for "
            f"{distributed.world_size()}: {describe_space(output, needed)}"
        )
    logger.info("converting %s from %d to %d processes", checkpoint, manifest.world_size, distributed.world_size())
    target = made / checkpoint.name
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in (NAME, "latest"):
            (target / path.name).symlink_to(path.absolute())
    _convert(shards, target / f"{shards.name}_{_FOLDER}")
    return target


def _convert(shards: Path, target: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(shards), "--output_folder", str(target)]
    command += ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ResumeError(f"{shards} cannot be converted for another number of processes: {last}")


def is_converted(checkpoint: Path) -> bool:
    """Whether a folder was made by ``convert_for_world_size``."""
    return (checkpoint / _LATEST).is_file()


def set_load_universal(training: Any, checkpoint: str | None) -> None:
    """Sets DeepSpeed's ``load_universal`` for a converted checkpoint; call on every rank before the Trainer is made."""
    if checkpoint is not None and is_converted(Path(checkpoint)):
        training.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True
