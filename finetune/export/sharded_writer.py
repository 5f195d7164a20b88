"""Writes safetensors shards of a maximum size, tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoints.safetensors_io import DTYPES, copy_tensor, shard_name, write_header
from finetune.export.lora_merge import TensorSource
from finetune.model_folders.checkpoint_folder import INDEX, WEIGHTS
from finetune.models.strict_loading import PASSTHROUGH_PREFIXES
from finetune.utils.errors import CheckpointError, UserError

_HEADER_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Disk space beyond the weights: tokenizer, code files, headers.
_MARGIN = 1 << 28


class WeightFiles:
    """The weight files of a model to be written.

    Args:
        weights: the tensors.
        dtype: of the result; None keeps that of every tensor. Tensors that the model does not build keep theirs.
        shard_size: maximum bytes of tensors per file; a larger tensor gets a file of its own.

    Attributes:
        weights: as given.
    """

    def __init__(self, weights: TensorSource, *, dtype: torch.dtype | None, shard_size: int) -> None:
        self.weights = weights
        self._dtypes = {name: self._dtype_of(name, dtype) for name in weights.stored}
        self._sizes = {name: self._size_of(name) for name in weights.stored}
        self._shards = self._assign(shard_size)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(self._sizes.values())

    def write(self, folder: Path) -> int:
        """Writes the files and, for several shards, their index; returns the number of files.

        Raises:
            CheckpointError: a value that the dtype of the result cannot represent.
        """
        names = [WEIGHTS]
        if (count := len(self._shards)) > 1:
            names = [shard_name(number, count) for number in range(1, count + 1)]
        for name, shard in zip(names, self._shards, strict=True):
            self._write_file(folder / name, shard)
        if count > 1:
            places = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return count

    def _write_file(self, path: Path, shard: list[str]) -> None:
        stored = self.weights.stored
        with path.open("wb") as file:
            write_header(file, {name: (self._dtypes[name], stored[name].shape, self._sizes[name]) for name in shard})
            for name in shard:
                if name not in self.weights.changed and self._dtypes[name] == stored[name].dtype:
                    copy_tensor(stored[name], file)
                else:
                    file.write(self._bytes(name))

    def _bytes(self, name: str) -> memoryview:
        tensor = self.weights.read(name)
        if list(tensor.shape) != list(self.weights.stored[name].shape):
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the adapter, {tuple(self.weights.stored[name].shape)} in the base"
            )
        cast = tensor.to(device="cpu", dtype=DTYPES[self._dtypes[name]]).contiguous()
        if not cast.isfinite().all():
            raise CheckpointError(
                f"{name} has values that {cast.dtype} cannot represent, or is damaged: try --infer_dtype bfloat16"
            )
        plain: Any = cast.flatten().view(torch.uint8).numpy()
        return memoryview(plain)

    def _dtype_of(self, name: str, wish: torch.dtype | None) -> str:
        found = self.weights.stored[name].dtype
        if wish is None or found not in DTYPES or name.startswith(PASSTHROUGH_PREFIXES):
            return found
        return _HEADER_NAMES[wish]

    def _size_of(self, name: str) -> int:
        stored = self.weights.stored[name]
        if self._dtypes[name] == stored.dtype:
            return stored.size
        return math.prod(stored.shape) * DTYPES[self._dtypes[name]].itemsize

    def _assign(self, shard_size: int) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in self._sizes.items():
            if filled + size > shard_size and shards[-1]:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        # The largest dtypes first: each tensor then begins at a multiple of its item size, as readers expect.
        width = {name: DTYPES[kind].itemsize if kind in DTYPES else 8 for name, kind in self._dtypes.items()}
        return [sorted(shard, key=lambda name: -width[name]) for shard in shards]


def check_export_space(folder: Path, needed: int) -> None:
    """Checks that the disk has space for the weights.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, the result needs {(needed + _MARGIN) / 1e9:.1f} GB: free some, or "
            "choose an --export_dir on another disk"
        )
