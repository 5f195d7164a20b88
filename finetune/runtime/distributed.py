"""Starts and stops the process group, logs and broadcasts from rank 0, frees cached GPU memory."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

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
    """Broadcasts the value of rank 0; every rank must call it, once the process group exists."""
    import torch.distributed as dist
    from accelerate.utils import broadcast_object_list

    values = [value]
    if dist.is_available() and dist.is_initialized():
        broadcast_object_list(values)
    return values[0]


def setup_logging() -> None:
    """Logs messages of rank 0 on stderr; the other ranks log errors only."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    silence_unactionable_warnings()
    for name in ("finetune", "trainer", "dataset", "__main__"):
        logging.getLogger(name).setLevel(level)


def prepare_deepspeed_on_cpu() -> None:
    """Lets DeepSpeed start on a machine without GPU and without a compiler; call before anything imports it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # As its own launcher sets it; without, ZeRO-3 starts numactl for every gradient that it reduces.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed.ops

    # Otherwise every CPU start builds a shared-memory all-reduce with a C++ compiler; gloo serves as well. There is
    # no public switch for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]


def prepare_single_process() -> None:
    """Makes a process without a launcher rank 0 of 1; DeepSpeed would otherwise discover ranks through MPI."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: value for name, value in alone.items() if name not in os.environ})


def start(training: TrainingArguments) -> None:
    """Initialises DeepSpeed's process group, without which a ZeRO-3 model would be loaded unpartitioned."""
    if training.device.type == "cuda" and training.deepspeed:
        import deepspeed

        deepspeed.init_distributed()
    elif training.deepspeed:
        import deepspeed

        prepare_single_process()
        deepspeed.init_distributed(dist_backend="gloo")


def stop() -> None:
    """Waits for all ranks and destroys the process group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def free_memory() -> None:
    """Releases cached GPU memory, for the process that verifies the result."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
