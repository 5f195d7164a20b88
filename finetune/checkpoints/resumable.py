"""Checks that a run can resume from a complete checkpoint: all files are there, readable, safe and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.checkpoints.manifest import Manifest
from finetune.checkpoints.passthrough_tensors import PASSTHROUGH_PREFIXES
from finetune.checkpoints.pickle_check import DamagedError, check_pickles, pickled_files
from finetune.model_folders.checkpoint_folder import INDEX, WEIGHTS
from finetune.models.finite_weights import check_file, check_types
from finetune.utils.errors import CheckpointError
from finetune.utils.json_objects import read_object

_LATEST = "latest"
_STATE = "trainer_state.json"
_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_SHARDED = 3


def why_not_resumable(folder: Path, manifest: Manifest) -> str | None:
    """Why a run cannot resume from a checkpoint whose manifest matches; None if it can.

    Raises:
        ForeignCodeError: a file may run code when it is unpickled.
    """
    try:
        check_pickles(pickled_files(folder))
    except DamagedError as error:
        return str(error)
    return (
        _state_fault(folder, manifest)
        or _missing(folder, manifest)
        or _weights_fault(folder, manifest)
        or (manifest.doubt or None)
    )


def shards_folder(folder: Path) -> Path | str:
    """The folder of DeepSpeed's checkpoint shards that the file "latest" names, or an error message."""
    name = (folder / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not name or Path(name).name != name or (folder / name).is_symlink():
        return f"the file {_LATEST!r} names {name!r}, which is no folder in it"
    return folder / name if (folder / name).is_dir() else f"the folder {name!r} that {_LATEST!r} names is missing"


def _state_fault(folder: Path, manifest: Manifest) -> str | None:
    values, fault = _read_object(folder / _STATE)
    if fault is not None:
        return fault
    if values.get("global_step") != manifest.step:
        return f"{_STATE} has global_step {values.get('global_step')!r}, the manifest step {manifest.step}"
    if not isinstance(values.get("log_history"), list) or not isinstance(values.get("stateful_callbacks", {}), dict):
        return f"{_STATE} is not what the Trainer writes: log_history is no list, or stateful_callbacks no object"
    return None


def _read_object(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON object, or an error message."""
    if not path.is_file():
        return {}, f"{path.name} is missing"
    try:
        return read_object(path), None
    except CheckpointError as error:
        return {}, str(error)


def _missing(folder: Path, manifest: Manifest) -> str | None:
    """A message about missing files of the training state."""
    count = manifest.world_size
    wanted = ["scheduler.pt"]
    wanted += ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    if manifest.zero_stage or (folder / _LATEST).is_file():
        if not (folder / _LATEST).is_file():
            return f"{_LATEST} is missing, which names the folder of DeepSpeed's checkpoint shards"
        if isinstance(shards := shards_folder(folder), str):
            return shards
        sharded = manifest.zero_stage == _SHARDED
        for pattern, least in (("*_model_states.pt", count if sharded else 1), ("*_optim_states.pt", count)):
            if (found := len(list(shards.glob(pattern)))) < least:
                return f"{shards.name} has {found} of {least} files {pattern}"
    else:
        wanted.append("optimizer.pt")
    absent = [name for name in wanted if not (folder / name).is_file()]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing" if absent else None


def _weights_fault(folder: Path, manifest: Manifest) -> str | None:
    if manifest.method == "lora":
        _, fault = _read_object(folder / _ADAPTER_CONFIG)
        if fault is not None:
            return fault
    files, fault = _weight_files(folder, manifest)
    if fault is not None:
        return fault
    for path in files:
        try:
            check_types(path, PASSTHROUGH_PREFIXES)
            check_file(path)
        except CheckpointError as error:
            return str(error)
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged: {error}"
    return None


def _weight_files(folder: Path, manifest: Manifest) -> tuple[list[Path], str | None]:
    """The weight files, and a message about missing ones; with ZeRO-3 there are none unless weights were gathered."""
    name = _ADAPTER if manifest.method == "lora" else WEIGHTS
    if (folder / name).is_file():
        return [folder / name], None
    if manifest.method == "full" and (folder / INDEX).is_file():
        index, fault = _read_object(folder / INDEX)
        shards = index.get("weight_map")
        if fault is not None or not isinstance(shards, dict):
            return [], fault or f"{INDEX} has no weight_map"
        files = [folder / Path(str(shard)).name for shard in sorted(set(map(str, shards.values())))]
        absent = [file.name for file in files if not file.is_file()]
        return files, f"{absent[0]} is missing" if absent else None
    return [], None if manifest.zero_stage == _SHARDED else f"{name} is missing"
