"""Space for what a run saves, and what to say when something cannot be written."""

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

# What else a checkpoint has: tokenizer, states of the Trainer and of random numbers, scripts of DeepSpeed.
_BESIDE = 1 << 18
_BLOCK = 4096
# What torch's writer of archives says when the system did not take its bytes.
_TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter", "iostream error", "cannot be opened", "Parent directory")
_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "lion": 4, "lion_32bit": 4, "adagrad": 4}


class SpaceError(UserError):
    """There is no space for what the run would save."""


def write_fault(error: BaseException) -> str | None:
    """What kept something from being written, in words; None for an error that is about something else."""
    if isinstance(error, OSError):
        names = {errno.ENOSPC: "no space left on the device", errno.EROFS: "the file system is read-only"}
        names |= {errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is larger than is allowed here"}
        return names.get(error.errno or 0, error.strerror or str(error))
    if isinstance(error, SafetensorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITER)
    ):
        return (str(error).splitlines() or ["the file could not be written"])[0]
    return None


def free_space(folder: Path) -> int | None:
    """Bytes that may be written where a folder is or will be; None when nobody can tell."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def written_size(folder: Path) -> int:
    """Bytes that the files of a folder take, in whole blocks."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes)


def describe_space(folder: Path, needed: int | None) -> str:
    """Space needed and free, in words."""
    free = free_space(folder)
    parts = [] if needed is None else [f"about {_size(needed)} needed"]
    parts += [] if free is None else [f"{_size(free)} free"]
    return f"{', '.join(parts)} in {folder}"


def checkpoint_size(model: nn.Module, args: Any) -> int:
    """Bytes that a checkpoint will take, without the reserve of a file system.

    Args:
        model: the network, before it is wrapped.
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
    # Without ZeRO-3 the module once more beside the weights; the fp32 masters, the states of the optimizer.
    copies = 1 if zero_stage(args.deepspeed) == 3 else 2  # noqa: PLR2004 - the stage
    return copies * saved + trained * (4 + _state_bytes(args)) + _BESIDE


def _state_bytes(args: Any) -> int:
    """Bytes per trained parameter that the optimizer keeps; two moments in fp32 unless it is known to keep less."""
    name = str(getattr(args.optim, "value", args.optim))
    return _STATES.get(name, 2 if "8bit" in name else 8)


def check_space(output: Path, size: int, count: int | None) -> None:
    """Compares the space that checkpoints will take with what is free, before the first step.

    Args:
        output: folder of the run.
        size: of a checkpoint, in bytes.
        count: how many there will be at once, None where no limit is set and their number is not known.

    Raises:
        SpaceError: not even one fits.
    """
    free = free_space(output)
    if free is None:
        return
    if free < size:
        raise SpaceError(
            f"a checkpoint takes about {_size(size)}, {output} has {_size(free)} free: make space, give another "
            "--output_dir, or train without checkpoints (--save_strategy no)"
        )
    if count is not None and free < size * count:
        logger.warning(
            "%d checkpoints (--save_total_limit and the one being written) take about %s, %s has %s free: saving will "
            "fail when it is full; a smaller --save_total_limit or more space keeps that from happening",
            count, _size(size * count), output, _size(free),
        )  # fmt: skip


def probe(folder: Path) -> None:
    """Makes a folder and writes a little into it, so that what cannot be written at all is known before much is done.

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


class NotingWriter:
    """DeepSpeed's writer of checkpoints that notes what it could not write: a rank that raised would leave the others
    waiting for it.

    Args:
        inner: the ``checkpoint_engine`` of the engine; everything but writing is left to it.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.faults: list[str] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a folder, or notes why not."""
        self._note(self._inner.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Writes a file, or notes why not."""
        self._note(self._inner.save, state_dict, path)

    def _note(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if (fault := write_fault(error)) is None:
                raise
            self.faults.append(fault)

    def __getattr__(self, name: str) -> Any:
        """What is not about writing."""
        return getattr(self._inner, name)


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
