"""Copies tensors that the model does not build (the speech output of MiniCPM-o) from the base into full results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.checkpoints.safetensors_io import StoredTensor, copy_tensor, shard_name, stored_in, write_header
from finetune.model_folders.checkpoint_folder import INDEX, WEIGHTS, weight_files
from finetune.models.strict_loading import PASSTHROUGH_PREFIXES


def copy_passthrough_tensors(base: Path, folder: Path) -> None:
    """Adds the tensors of ``base`` that the model does not build to the weights in ``folder``, as one more shard.

    The file is written block by block: no tensor is held in memory. Without such tensors nothing changes.
    """
    tensors = {
        name: stored for name, stored in stored_in(weight_files(base)).items() if name.startswith(PASSTHROUGH_PREFIXES)
    }
    if not tensors:
        return
    index = _with_one_more_shard(folder)
    count = len(set(index["weight_map"].values())) + 1
    shard = shard_name(count, count)
    _write(folder / shard, tensors)
    index["weight_map"].update(dict.fromkeys(tensors, shard))
    metadata = index["metadata"]
    metadata["total_size"] += sum(stored.size for stored in tensors.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(math.prod(stored.shape) for stored in tensors.values())
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_one_more_shard(folder: Path) -> dict[str, Any]:
    """Renames the weight files for a count that is one higher; returns their index."""
    if (folder / WEIGHTS).is_file():  # just written; an index beside it is of an earlier save, and replaced by ours
        tensors = stored_in([folder / WEIGHTS])
        only = shard_name(1, 2)
        (folder / WEIGHTS).rename(folder / only)
        size = sum(stored.size for stored in tensors.values())
        return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, only)}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    names = {old: re.sub(r"-of-\d+", f"-of-{len(files) + 1:05d}", old) for old in files}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
    return index


def _write(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    with path.open("wb") as target:
        write_header(target, {name: (stored.dtype, stored.shape, stored.size) for name, stored in tensors.items()})
        for stored in tensors.values():
            copy_tensor(stored, target)
