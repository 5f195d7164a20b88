"""Where a checkpoint is on this machine."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError
from finetune.families.settings import FILES, PROCESSORS
from finetune.paths import expand

# What makes a folder one that could have been meant.
_CONFIGS = ("adapter_config.json", "config.json")
# Folders that are looked into for a hint.
_LOOKED_INTO = 2000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights as safetensors only, never pickled; code files are copied into full results, not run.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")


def local_folder(name: str, revision: str | None = None) -> Path:
    """The folder that a path or a hub id stands for, absolute; only a hub id may be downloaded.

    Args:
        name: a folder, or "owner/name" on the hub where there is no such folder.
        revision: commit, branch or tag of the hub id.

    Raises:
        CheckpointError: neither a folder nor to be had from the hub.
    """
    folder = expand(name)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith(".") or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder (looked in {Path.cwd()}){nearest_folders(folder)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES))).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{name} is no folder here ({Path.cwd()}) and could not be fetched from the hub: {error}. Download it once "
            "with network access, or give a folder (HF_HOME and HF_ENDPOINT are respected)"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a folder.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json and, where the folder describes them, the settings of its processors by their names.

    Those are the keys of ``families.settings.PROCESSORS``; ``setting_files`` says which file each was read from.

    Raises:
        CheckpointError: a file that is not JSON.
    """
    read: dict[str, dict[str, Any]] = {}
    given: dict[str, Any] = {}
    for name, places in PROCESSORS.items():
        for file, key in places:
            path = folder / file
            if file not in read:
                read[file] = read_json(path) if path.is_file() else {}
            if found := (read[file].get(key) if key else read[file]):
                given[name] = found
                given.setdefault(FILES, {})[name] = f"{file}, {key}" if key else file
                break
    return {**config, **given}


def nearest_folders(missing: Path) -> str:
    """The model and adapter folders whose paths are most like one that is not there, as the end of a message.

    They are looked for below the lowest folder of the path that exists.
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
        if any(name in files for name in _CONFIGS):
            found.append(os.path.relpath(folder, root))
        if number > _LOOKED_INTO:
            break
    near = difflib.get_close_matches(os.path.relpath(missing.absolute(), root), found, n=3, cutoff=0.5)
    return f"; the nearest that exist are {', '.join(str(root / name) for name in near)}" if near else ""
