"""Starting and ending the training processes, with and without GPUs."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from finetune.utils.errors import silence_unactionable_warnings

if TYPE_CHECKING:
    from transformers import TrainingArguments


def is_main_process() -> bool:
    """Whether this is rank 0 (also true without torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Number of processes, known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def from_main_process(value: str | None) -> str | None:
    """What rank 0 gave; every rank must call it, once the processes are connected."""
    values = [value]
    if dist.is_available() and dist.is_initialized():
        broadcast_object_list(values)
    return values[0]


def setup_logging() -> None:
    """Messages of rank 0 on stderr; the other ranks only report errors."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    silence_unactionable_warnings()
    for name in ("finetune", "trainer", "dataset", "__main__"):
        logging.getLogger(name).setLevel(level)


def prepare_deepspeed_on_cpu() -> None:
    """Lets DeepSpeed start on a machine without GPU and without a compiler; call before anything imports it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # Otherwise every CPU start builds a shared-memory all-reduce with a C++ compiler; gloo serves as well. There is
    # no public switch for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]


def prepare_lone_process() -> None:
    """Makes a process that no launcher has started rank 0 of 1, which DeepSpeed would otherwise ask MPI about."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: value for name, value in alone.items() if name not in os.environ})


def start(training: TrainingArguments) -> None:
    """Brings the process group up; DeepSpeed's must exist before a ZeRO-3 model is loaded, or it is not partitioned."""
    if training.device.type == "cuda" and training.deepspeed:
        import deepspeed

        deepspeed.init_distributed()
    elif training.deepspeed:
        import deepspeed

        prepare_lone_process()
        deepspeed.init_distributed(dist_backend="gloo")


def stop() -> None:
    """Waits for all ranks and takes the process group down."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def free_memory() -> None:
    """Gives cached GPU memory back to the driver, for the process that verifies the result."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
