"""Where a checkpoint is on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.errors import CheckpointError

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
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith(".") or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder (looked in {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES))).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{name} is no folder here ({Path.cwd()}) and could not be fetched from the hub: {error}. Download it once "
            "with network access, or give a folder (HF_HOME and HF_ENDPOINT are respected)"
        ) from error
