"""The checkpoint folder a run starts from, and the files a result takes over from it unchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError
from finetune.families import detect
from finetune.families.base import Family
from finetune.families.common import vocab_size
from finetune.models.folders import local_folder
from finetune.models.strict import check_unquantised

# Parts of processor_config.json that say how media become pixels.
PROCESSORS = ("image_processor", "video_processor")
# Tokenizer, processor and generation settings: copied byte for byte, never re-serialised.
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
# A full checkpoint is also the network's description and the code that official loaders run.
FULL_FILES = (*SIDE_FILES, "config.json", "*.py")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base checkpoint on this machine.

    Attributes:
        folder: where its files are, absolute.
        name: what is recorded in adapters: the absolute folder, or the hub id.
        revision: commit of the hub id, None for a folder.
        config: config.json as a dictionary, exactly as read.
        family: the generation it belongs to.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    family: Family

    @property
    def settings(self) -> dict[str, Any]:
        """config.json and, where the folder describes them, the settings of its processors by their names.

        Those are ``image_processor`` and ``video_processor``.
        """
        whole, part = self.folder / "preprocessor_config.json", self.folder / "processor_config.json"
        parts = _read_json(part) if part.is_file() else {}
        given = {name: parts[name] for name in PROCESSORS if parts.get(name) is not None}
        if "image_processor" not in given and whole.is_file():
            given["image_processor"] = _read_json(whole)
        return {**self.config, **given}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return vocab_size(self.config)


def resolve(model_name_or_path: str) -> Checkpoint:
    """Finds the checkpoint; a hub id (no such folder, form "owner/name") is downloaded.

    Raises:
        CheckpointError: no such folder, or a folder without config.json or with quantised weights.
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    folder = local_folder(model_name_or_path)
    hub = not Path(model_name_or_path).expanduser().is_dir()
    # A downloaded snapshot lies in a folder named after its commit.
    name, revision = (model_name_or_path, folder.name) if hub else (str(folder), None)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter; training starts from its base checkpoint")
    config = read_config(folder)
    return Checkpoint(folder, name, revision, config, detect(config))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: it is missing or not JSON, or the weights beside it are quantised.
    """
    check_unquantised(folder)  # first: a folder of GGUF files alone has no config.json
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; it is not a model folder")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copies the files of ``source`` that match, byte for byte; returns their names."""
    names = sorted({path.name for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
