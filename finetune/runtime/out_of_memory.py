"""Out-of-memory errors of the GPU: recognised, and their figures read from the message."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.runtime.processes import RUN_FOLDER
from finetune.utils.errors import UserError

GIB = 2**30
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
# What else CUDA and its libraries call it.
_TEXTS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB|TiB)"
_ASKED = re.compile(rf"Tried to allocate {_SIZE}")
_CAPACITY = re.compile(rf"total capacity of {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_OWN = re.compile(rf"this process has {_SIZE} memory in use")
_UNUSED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
# The variable has another name in newer versions of torch.
_SETTING = re.compile(r"\b(PYTORCH_\w*CONF=expandable_segments:True)\b")
# Ranks run out together: time for all of them to say so, and for the one that explains it.
_GATHER, _EXPLAIN = 1.0, 120.0
_SLICES = 9
_MARK, _TOLD = "out-of-memory-rank-", "out-of-memory"


class OutOfMemoryError(UserError):
    """The memory of the GPU does not suffice."""

    exit_code = 6


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the memory of the GPU does not suffice."""
    torch = sys.modules.get("torch")  # without it there is no such error
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@dataclass(frozen=True, slots=True)
class Allocation:
    """The figures of an out-of-memory error in bytes; None where the message does not have them.

    Attributes:
        asked: size of the tensor that was to be made.
        free: what was free.
        capacity: memory of the GPU.
        own: what this process holds.
        unused: what torch holds for this process without using it.
        setting: the environment variable that lets torch use that, with its value; "" for none.
    """

    asked: int | None = None
    free: int | None = None
    capacity: int | None = None
    own: int | None = None
    unused: int | None = None
    setting: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Allocation:
        """Reads the message of torch's allocator."""
        message = str(error)
        setting = _SETTING.search(message)
        return cls(
            *(_bytes(pattern, message) for pattern in (_ASKED, _FREE, _CAPACITY, _OWN, _UNUSED)),
            setting=setting[1] if setting else "",
        )

    @property
    def available(self) -> int | None:
        """What this process could have: the GPU's memory without what other processes hold."""
        if self.own is not None and self.free is not None:
            return self.own + self.free
        return self.capacity

    @property
    def others(self) -> int:
        """What other processes hold."""
        return 0 if self.capacity is None else max(self.capacity - (self.available or self.capacity), 0)

    @property
    def fragmented(self) -> bool:
        """Whether what torch holds without using it would have been enough."""
        return bool(self.setting) and self.asked is not None and (self.unused or 0) > self.asked

    def __str__(self) -> str:
        """The figures as words; empty if the message has none."""
        asked = None if self.asked is None else f"{gigabytes(self.asked)} asked for"
        free = None
        if self.free is not None and self.capacity is not None:
            free = f"{gigabytes(self.free)} of {gigabytes(self.capacity)} free"
        others = f"{gigabytes(self.others)} in use by other processes" if self.others > GIB else None
        return ", ".join(filter(None, (asked, free, others)))


def gigabytes(size: float) -> str:
    """Bytes as text, in GB of 2**30 bytes, with two digits at least."""
    value = size / GIB
    return f"{value:.1f} GB" if value >= 1 else f"{value:.2g} GB"


def _bytes(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


@contextmanager
def explaining(flags: Callable[[], Sequence[str]], kept: str) -> Iterator[None]:
    """Turns an error of GPU memory inside the context into one that names flags that need less.

    Args:
        flags: returns them, the cheapest first.
        kept: what remains of the work.

    Raises:
        OutOfMemoryError: the context ended with such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        figures = f": {found}" if str(found := Allocation.of(error)) else ""
        named = flags() or ["a larger GPU, or --device cpu"]
        lines = [f"out of GPU memory{figures}; {kept}. What needs less, the cheapest first:"]
        raise OutOfMemoryError("\n    ".join([*lines, *named])) from error


def fewer_slices(now: int | None) -> str:
    """The flag for images of fewer slices than now; None stands for the checkpoint's number, mostly 9."""
    return f"--max_slice_nums {max((now or _SLICES) // 2, 1)}"


def told_by_first() -> str | None:
    """The explanation of another rank of this machine that ran out of memory too; None if this rank must explain.

    The first of these ranks explains, and calls ``tell``; the others wait here for it, as the launcher ends all ranks
    with the first that ends.
    """
    if (folder := os.environ.get(RUN_FOLDER)) is None:
        return None
    own, told = int(os.environ.get("RANK", "0")), Path(folder) / _TOLD
    (Path(folder) / f"{_MARK}{own}").touch()
    time.sleep(_GATHER)
    if own == min(int(path.name.removeprefix(_MARK)) for path in Path(folder).glob(f"{_MARK}*")):
        return None
    end = time.monotonic() + _EXPLAIN
    while time.monotonic() < end and not told.exists():
        time.sleep(0.1)
    return told.read_text(encoding="utf-8") if told.exists() else None


def tell(message: str) -> None:
    """Gives the explanation to the other ranks of this machine."""
    if (folder := os.environ.get(RUN_FOLDER)) is not None:
        unfinished = Path(folder) / f".{_TOLD}"
        unfinished.write_text(message, encoding="utf-8")
        unfinished.replace(Path(folder) / _TOLD)
