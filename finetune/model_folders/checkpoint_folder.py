"""Resolves model and adapter folders (downloads hub ids), checks their JSON files and lists their weight files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.families import FAMILIES
from finetune.families.settings import FILES, PROCESSORS
from finetune.model_folders import file_schemas
from finetune.utils.errors import CheckpointError
from finetune.utils.json_objects import read_object, read_text, shown
from finetune.utils.paths import expand

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SIDE_FILES = {
    "tokenizer_config.json": file_schemas.TOKENIZER_CONFIG,
    "special_tokens_map.json": file_schemas.SPECIAL_TOKENS,
    "generation_config.json": file_schemas.GENERATION,
}
# LoRA initialisations that change the weights of the base.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Folders that are searched for a hint.
_SEARCHED_FOLDERS = 2000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights as safetensors only, never pickled; code files are copied into full results, not run.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")


def resolve_folder(name: str, revision: str | None = None) -> Path:
    """The absolute folder of a path or hub id; only a hub id is downloaded.

    Args:
        name: a folder, or "owner/name" on the hub where there is no such folder.
        revision: commit, branch or tag of the hub id.

    Raises:
        CheckpointError: neither a folder nor available on the hub.
    """
    if (folder := existing_folder(name)) is not None:
        return folder
    refuse_uncached_offline(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES))).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise _not_available(name, str(error).splitlines()[0].rstrip(".")) from error


def refuse_uncached_offline(name: str) -> None:
    """Refuses at once, without a network, a hub id that is not in the cache while HF_HUB_OFFLINE is set.

    Raises:
        CheckpointError: with the nearest published hub id.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not any(
        isinstance(try_to_load_from_cache(name, file), str) for file in (CONFIG, ADAPTER_CONFIG)
    ):
        raise _not_available(name, "HF_HUB_OFFLINE is set and it is not in the cache")


def _not_available(name: str, why: str) -> CheckpointError:
    published = [family.hub_id for family in FAMILIES]
    near = difflib.get_close_matches(name, published, n=2) if name not in published else []
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return CheckpointError(
        f"{name}{hint} is no folder in {Path.cwd()} and cannot be had from the hub: {why}. Download it once with "
        "network access, or give a folder (HF_HOME and HF_ENDPOINT are respected)"
    )


def existing_folder(name: str) -> Path | None:
    """The folder that a path stands for, absolute; None for what may be a hub id.

    Raises:
        CheckpointError: a file, or a path that leads nowhere: it begins with a dot, is no "owner/name", or its first
            folder is here and has nothing of that name.
    """
    folder = expand(name)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith(".") or not _HUB_ID.fullmatch(name) or folder.parent.is_dir():
        raise CheckpointError(f"{name}: no such folder (looked in {Path.cwd()}){nearest_folders(folder)}")
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter; a folder that has config.json too is a full model."""
    return has_adapter(folder) and not (folder / CONFIG).is_file()


def refuse_adapter(folder: Path) -> None:
    """Refuses an adapter where a model is wanted to start training from.

    Raises:
        CheckpointError: it is one.
    """
    if is_adapter(folder):
        raise CheckpointError(f"{folder} is an adapter; training starts from its base checkpoint")


def has_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; also checks the JSON files of processors, tokenizer and generation.

    Raises:
        CheckpointError: it is missing, or a file is invalid.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; it is not a model folder")
    config = read_object(path)
    file_schemas.check_config(config, str(path))
    read_settings(folder, config)
    check_side_files(folder)
    return config


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        CheckpointError: it is missing or invalid, or its initialisation changes the weights of the base.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no adapter: {ADAPTER_CONFIG} is missing")
    settings = read_object(path)
    file_schemas.check(settings, file_schemas.ADAPTER, str(path))
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise CheckpointError(
            f"{path}: the adapter was initialised by {start}, which changes the weights of the base, so that it does "
            "not match the original base. Save it with peft's path_initial_model_for_weight_conversion and use that"
        )
    return settings


def check_side_files(folder: Path) -> None:
    """Checks the JSON files of tokenizer and generation in a model or adapter folder.

    Raises:
        CheckpointError: a file is invalid.
    """
    for name, table in _SIDE_FILES.items():
        if (path := folder / name).is_file():
            file_schemas.check(read_object(path), table, str(path))
    if (path := folder / "added_tokens.json").is_file():
        file_schemas.check(added := read_object(path), dict.fromkeys(added, file_schemas.NATURAL), str(path))
    if (path := folder / "chat_template.json").is_file():
        file_schemas.check(read_object(path), file_schemas.TOKENIZER_CONFIG, str(path))
    if (path := folder / "chat_template.jinja").is_file():
        read_text(path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder.

    Raises:
        CheckpointError: there are none, two sets of them, or the index of the shards cannot be used: it names a file
            that is not there or outside the folder.
    """
    _check_one_set(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder} has no weights: {WEIGHTS} or {INDEX} is missing")
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(
            f"{path}: weight_map is {shown(places)}; it should be an object from tensors to files: download it again"
        )
    names = sorted(set(places.values()))
    if outside := next((name for name in names if Path(name).name != name), None):
        raise CheckpointError(f"{path}: weight_map names {outside!r}, which is not a file beside it; download it again")
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder} lacks {missing[0]}{more} of the {len(names)} weight files that {INDEX} names: an interrupted "
            "download? Run it again"
        )
    return [folder / name for name in names]


def _check_one_set(folder: Path) -> None:
    """Refuses a folder with two sets of weights, of which loaders take one without a word.

    Raises:
        CheckpointError: naming both.
    """
    safe = [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).is_file()]
    if safe and len(found := [*safe, *pickled]) > 1:
        raise CheckpointError(
            f"{folder} has two sets of weights, {found[0]} and {found[1]}, which may differ: keep the one that is "
            "meant and move the other out of the folder"
        )


def read_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the settings of the processors, by processor, as far as the folder has them.

    Processors are the keys of ``families.settings.PROCESSORS``; ``setting_files`` names the file of each.

    Raises:
        CheckpointError: a file is invalid.
    """
    read: dict[str, dict[str, Any]] = {}
    given: dict[str, Any] = {}
    for name, places in PROCESSORS.items():
        for file, key in places:
            path = folder / file
            if file not in read:
                read[file] = _processor(path) if path.is_file() else {}
            if found := (read[file].get(key) if key else read[file]):
                given[name] = found
                given.setdefault(FILES, {})[name] = f"{file}, {key}" if key else file
                break
    return {**config, **given}


def _processor(path: Path) -> dict[str, Any]:
    """Reads and checks a processor file with its sections."""
    values = read_object(path)
    file_schemas.check(values, file_schemas.PROCESSOR, str(path))
    for part, inside in values.items():
        if isinstance(inside, dict):
            file_schemas.check(inside, file_schemas.PROCESSOR, f"{path}, {part}")
    return values


def nearest_folders(missing: Path) -> str:
    """Model and adapter folders with paths similar to a missing one, as the end of a message.

    They are searched below the deepest existing folder of the path.
    """
    root = missing.absolute()
    while not root.is_dir():
        root = root.parent
    if root == Path(root.anchor):
        return ""
    found = []
    for number, (folder, folders, files) in enumerate(os.walk(root)):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in ("node_modules", "__pycache__")
        ]
        if any(name in files for name in (ADAPTER_CONFIG, CONFIG)):
            found.append(os.path.relpath(folder, root))
        if number > _SEARCHED_FOLDERS:
            break
    near = difflib.get_close_matches(os.path.relpath(missing.absolute(), root), found, n=3, cutoff=0.5)
    return f"; the nearest that exist are {', '.join(str(root / name) for name in near)}" if near else ""
