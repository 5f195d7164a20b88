"""Disk space: expected size of checkpoints, checks before training, messages and a record of failed writes."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from finetune.checkpoints.manifest import zero_stage
from finetune.training.freezing import numel
from finetune.utils.errors import UserError

logger = logging.getLogger(__name__)

# Bytes of the other files of a checkpoint: tokenizer, states of the Trainer and of random numbers, DeepSpeed's script.
_BESIDE = 1 << 18
_BLOCK = 4096
# Texts in errors of torch.save when a write failed.
_TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter", "iostream error", "cannot be opened", "Parent directory")
_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "lion": 4, "lion_32bit": 4, "adagrad": 4}


class SpaceError(UserError):
    """The disk has no space for a checkpoint of the run."""


def write_fault(error: BaseException) -> str | None:
    """The message of a failed write; None for an error that has another cause."""
    if isinstance(error, OSError):
        names = {errno.ENOSPC: "no space left on the device", errno.EROFS: "the file system is read-only"}
        names |= {errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is larger than is allowed here"}
        return names.get(error.errno or 0, error.strerror or str(error))
    if isinstance(error, SafetensorError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_WRITER)
    ):
        return (str(error).splitlines() or ["the file could not be written"])[0]
    return None


def free_space(folder: Path) -> int | None:
    """Free bytes on the file system of a folder that need not exist; None if unknown."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def written_size(folder: Path) -> int:
    """Bytes that the files of a folder take on disk, rounded up to blocks."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes)


def describe_space(folder: Path, needed: int | None) -> str:
    """Needed and free space, for messages."""
    free = free_space(folder)
    parts = [] if needed is None else [f"about {_size(needed)} needed"]
    parts += [] if free is None else [f"{_size(free)} free"]
    return f"{', '.join(parts)} in {folder}"


def checkpoint_size(model: nn.Module, args: Any) -> int:
    """Expected size of a checkpoint in bytes.

    Args:
        model: the model, before it is wrapped.
        args: the training flags.
    """
    saved = trained = 0
    lora = args.use_lora
    itemsize = 2 if args.deepspeed and (args.bf16 or args.fp16) else 4
    for parameter in model.parameters():
        count = numel(parameter)
        trained += count if parameter.requires_grad else 0
        if parameter.requires_grad or not lora:
            saved += count * (itemsize if parameter.requires_grad else parameter.element_size())
    if args.save_only_model:
        return saved + _BESIDE
    if not args.deepspeed:
        return saved + trained * _state_bytes(args) + _BESIDE
    # Without ZeRO-3 DeepSpeed's model states repeat the weights; then fp32 master weights and optimizer state.
    copies = 1 if zero_stage(args.deepspeed) == 3 else 2  # noqa: PLR2004 - the stage
    return copies * saved + trained * (4 + _state_bytes(args)) + _BESIDE


def _state_bytes(args: Any) -> int:
    """Bytes of optimizer state per trained parameter; two fp32 moments for an unknown optimizer."""
    name = str(getattr(args.optim, "value", args.optim))
    return _STATES.get(name, 2 if "8bit" in name else 8)


def check_space(output: Path, size: int, count: int | None) -> None:
    """Compares the expected size of checkpoints with the free space, before the first step.

    Args:
        output: folder of the run.
        size: of a checkpoint, in bytes.
        count: number of checkpoints that exist at a time; None without --save_total_limit.

    Raises:
        SpaceError: there is no space for one.
    """
    free = free_space(output)
    if free is None:
        return
    if free < size:
        raise SpaceError(
            f"a checkpoint takes about {_size(size)}, {output} has {_size(free)} free: free disk space, give another "
            "--output_dir, or train without checkpoints (--save_strategy no)"
        )
    if count is not None and free < size * count:
        logger.warning(
            "%d checkpoints (--save_total_limit and the one being written) take about %s, %s has %s free: saving will "
            "fail when the disk is full; free disk space or reduce --save_total_limit",
            count, _size(size * count), output, _size(free),
        )  # fmt: skip


def check_writable(folder: Path) -> None:
    """Makes a folder and writes one byte to a file in it.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".probe-{os.getpid()}"
    try:
        with file.open("wb") as target:
            target.write(b"\0")
            target.flush()
            os.fsync(target.fileno())
    finally:
        file.unlink(missing_ok=True)


class RecordingWriter:
    """Wraps DeepSpeed's checkpoint writer and records errors instead of raising them.

    A rank that raised would leave the others waiting for it in a collective.

    Args:
        inner: the ``checkpoint_engine`` of the engine; everything but writing is delegated to it.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.faults: list[str] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder; records an error."""
        self._record(self._inner.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Writes a file; records an error."""
        self._record(self._inner.save, state_dict, path)

    def _record(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if (fault := write_fault(error)) is None:
                raise
            self.faults.append(fault)

    def __getattr__(self, name: str) -> Any:
        """Delegates everything else."""
        return getattr(self._inner, name)


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
