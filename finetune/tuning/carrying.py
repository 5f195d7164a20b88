"""Tensors that the network does not have (the speech output of MiniCPM-o) go from base to result byte for byte."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# Beginnings of their names.
CARRIED = ("tts.",)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a safetensors file.

    Attributes:
        file: the file.
        offset: first byte.
        size: in bytes.
        dtype: as in the header of the file, e.g. "BF16".
        shape: as in the header.
    """

    file: Path
    offset: int
    size: int
    dtype: str
    shape: list[int]


def carry(base: Path, folder: Path) -> None:
    """Adds the carried tensors of ``base`` to the weights saved in ``folder``, as one more shard; none change nothing.

    The file is written block by block: no tensor is held in memory.
    """
    tensors = {name: stored for name, stored in _stored(base) if name.startswith(CARRIED)}
    if not tensors:
        return
    index = _with_one_more_shard(folder)
    count = len(set(index["weight_map"].values())) + 1
    shard = _shard_name(count, count)
    _write(folder / shard, tensors)
    index["weight_map"].update(dict.fromkeys(tensors, shard))
    metadata = index["metadata"]
    metadata["total_size"] += sum(stored.size for stored in tensors.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(math.prod(stored.shape) for stored in tensors.values())
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    """The weight files of a model folder."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _stored(folder: Path) -> Iterator[tuple[str, Stored]]:
    """All tensors of a model folder, read from the headers of its files."""
    for path in _files(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            yield name, Stored(path, 8 + length + start, end - start, entry["dtype"], entry["shape"])


def _with_one_more_shard(folder: Path) -> dict[str, Any]:
    """Renames the weight files as the first of one more; returns the index that describes them."""
    if (folder / _WEIGHTS).is_file():
        tensors = dict(_stored(folder))
        only = _shard_name(1, 2)
        (folder / _WEIGHTS).rename(folder / only)
        size = sum(stored.size for stored in tensors.values())
        return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, only)}
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    names = {old: re.sub(r"-of-\d+", f"-of-{len(files) + 1:05d}", old) for old in files}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
    return index


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A safetensors file: length of the header, header, bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        offsets = [end, end + stored.size]
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": offsets}
        end += stored.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for stored in tensors.values():
            with stored.file.open("rb") as source:
                source.seek(stored.offset)
                _copy(source, target, stored.size)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        block = source.read(min(size, _BLOCK))
        if not block:
            raise EOFError(f"{source.name} ends in the middle of a tensor")
        target.write(block)
        size -= len(block)
