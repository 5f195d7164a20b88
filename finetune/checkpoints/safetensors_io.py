"""Reads and writes safetensors files tensor by tensor, by byte offsets, without loading whole files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune.utils.errors import CheckpointError

_BLOCK = 1 << 24
# By the names in headers: the dtypes that a merge can compute with.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location of a tensor in a safetensors file.

    Attributes:
        file: the file.
        offset: first byte.
        size: bytes.
        dtype: as in the header of the file, e.g. "BF16".
        shape: as in the header.
    """

    file: Path
    offset: int
    size: int
    dtype: str
    shape: list[int]


def stored_in(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of some safetensors files by name, in the order of the files; only headers are read."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(path, 8 + length + start, end - start, entry["dtype"], entry["shape"])
    return found


def shard_name(number: int, count: int) -> str:
    """The published name of a weight file, numbered from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_header(target: BinaryIO, tensors: Mapping[str, tuple[str, list[int], int]]) -> None:
    """Writes length and header of a safetensors file; the bytes of the tensors must follow in this order.

    Args:
        target: an empty file.
        tensors: dtype as in headers ("BF16"), shape and size in bytes by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    target.write(len(text).to_bytes(8, "little") + text)


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Reads one floating point tensor.

    Raises:
        CheckpointError: a dtype that is not floating point.
        EOFError: the file is shorter than its header says.
    """
    if stored.dtype not in DTYPES:
        raise CheckpointError(f"{stored.file}: tensors of dtype {stored.dtype} are not supported")
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    data: Any = tensor.flatten().view(torch.uint8).numpy() if stored.size else None
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        if data is not None and file.readinto(data) != stored.size:
            raise EOFError(f"{stored.file} ends in the middle of a tensor")
    return tensor


def copy_tensor(stored: StoredTensor, target: BinaryIO) -> None:
    """Appends the bytes of a tensor, block by block, without holding it in memory.

    Raises:
        EOFError: its file is shorter than its header says.
    """
    size = stored.size
    with stored.file.open("rb") as source:
        source.seek(stored.offset)
        while size:
            block = source.read(min(size, _BLOCK))
            if not block:
                raise EOFError(f"{stored.file} ends in the middle of a tensor")
            target.write(block)
            size -= len(block)
