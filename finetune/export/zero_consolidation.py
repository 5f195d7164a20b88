"""Consolidates ZeRO checkpoint shards into a model or adapter, for runs that ended before weights were gathered.

DeepSpeed's files are pickles, which can run code when they are unpickled: each is checked before DeepSpeed opens it.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.checkpoints.base_checkpoint import SIDE_FILES, BaseCheckpoint, copy_base_files, copy_files
from finetune.checkpoints.pickle_check import DamagedError, check_pickles, pickled_files
from finetune.checkpoints.resumable import shards_folder
from finetune.checkpoints.safetensors_io import StoredTensor, write_header
from finetune.export.lora_merge import BaseTensors, adapter_names, empty_model, tied_names
from finetune.model_folders.checkpoint_folder import ADAPTER_CONFIG, has_adapter, read_adapter_config
from finetune.model_folders.output_contents import RUN_FILE
from finetune.models.adapters import ADAPTER_WEIGHTS, trained_beside
from finetune.models.strict_loading import PASSTHROUGH_PREFIXES, some
from finetune.utils.errors import CheckpointError

# File with the name of the folder of the shards.
_LATEST = "latest"


class ConsolidatedTensors:
    """The tensors of a full training instead of those of its base; see ``TensorSource``.

    Raises:
        CheckpointError: the shards belong to another model, or tensors are missing.
    """

    def __init__(self, base: BaseCheckpoint, state: Mapping[str, Any]) -> None:
        model = empty_model(base.folder, duplex_rows=base.adds_duplex_rows)
        self._base, self._state = BaseTensors(base.folder, duplex_rows=base.adds_duplex_rows), state
        self.stored: Mapping[str, StoredTensor] = self._base.stored
        aliases = {name for names in tied_names(model) for name in names if name not in self.stored}
        wanted = {name for name in self.stored if not name.startswith(PASSTHROUGH_PREFIXES)} & set(model.state_dict())
        if missing := sorted(wanted - set(state)):
            raise CheckpointError(f"the ZeRO shards lack {len(missing)} tensors of {base.name}: {some(missing)}")
        if unknown := sorted(set(state) - wanted - aliases):
            raise CheckpointError(f"the ZeRO shards are not of {base.name}, which does not have {some(unknown)}")
        for name in wanted:
            here, there = tuple(self.stored[name].shape), tuple(state[name].shape)
            if here != there:
                raise CheckpointError(f"{name} is {there} in the ZeRO shards, {here} in {base.name}")
        self.changed = wanted
        self.untied = False
        self.replaced_in_full: set[str] = set()
        self.overridden: set[str] = set()

    def read(self, name: str) -> torch.Tensor:
        """One tensor in float32; DeepSpeed assembles it in this call."""
        return self._state[name].contiguous() if name in self.changed else self._base.read(name)


def read_shards(checkpoint: Path, *, trained_only: bool) -> Mapping[str, Any]:
    """The float32 weights of a DeepSpeed checkpoint by name; ``contiguous()`` makes each a tensor.

    Args:
        checkpoint: local folder with the file "latest" and the folder that it names.
        trained_only: skip frozen parameters.

    Raises:
        CheckpointError: shards are missing or damaged.
        ForeignCodeError: a shard may run code when it is unpickled.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not (checkpoint / _LATEST).is_file():
        raise CheckpointError(
            f"{checkpoint} has no ZeRO shards (the file {_LATEST!r} is missing): give a checkpoint-N folder of a run "
            "with DeepSpeed. If it has weights (*.safetensors), it needs no consolidation"
        )
    if isinstance(shards := shards_folder(checkpoint), str):
        raise CheckpointError(f"the ZeRO shards in {checkpoint} are not complete: {shards}")
    try:
        check_pickles([*pickled_files(checkpoint), *pickled_files(shards)])
    except DamagedError as error:
        raise CheckpointError(f"the ZeRO shards in {checkpoint} are not complete: {error}") from error
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            state: Any = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint), exclude_frozen_parameters=trained_only, lazy_mode=True
            )
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the ZeRO shards in {checkpoint} are not complete: {error}") from error
    return state


def base_named_by(checkpoint: Path) -> str | None:
    """The base of a run, from adapter_config.json, or from run.yaml in the checkpoint or its parent folder."""
    if has_adapter(checkpoint):
        name = read_adapter_config(checkpoint).get("base_model_name_or_path")
        if name:
            return name
    for place in (checkpoint, checkpoint.parent):
        if (place / RUN_FILE).is_file():
            run = yaml.safe_load((place / RUN_FILE).read_text(encoding="utf-8"))
            if isinstance(run, dict) and isinstance(run.get("base"), dict):
                return run["base"].get("name")
    return None


def write_adapter(folder: Path, checkpoint: Path, base: BaseCheckpoint, state: Mapping[str, Any]) -> int:
    """Writes an adapter folder from the trained tensors of a LoRA run; returns the number of tensors.

    Raises:
        CheckpointError: the shards are not of the adapter that adapter_config.json describes.
    """
    names = adapter_names(
        empty_model(base.folder, duplex_rows=base.adds_duplex_rows), checkpoint, trained_beside(checkpoint)
    )
    if missing := sorted(set(names) - set(state)):
        raise CheckpointError(
            f"the ZeRO shards in {checkpoint} lack {len(missing)} tensors of the adapter: {some(missing)}"
        )
    keys = dict(sorted((key, name) for name, key in names.items()))
    shapes = {key: list(state[name].shape) for key, name in keys.items()}
    with (folder / ADAPTER_WEIGHTS).open("wb") as file:
        write_header(file, {key: ("F32", shape, 4 * torch.Size(shape).numel()) for key, shape in shapes.items()})
        for name in keys.values():
            plain: Any = state[name].contiguous().float().flatten().view(torch.uint8).numpy()
            file.write(memoryview(plain))
    copy_base_files(base, folder, SIDE_FILES)
    copy_files(checkpoint, folder, (ADAPTER_CONFIG, "README.md"))
    return len(keys)
