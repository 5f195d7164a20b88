"""The checkpoint folder a run starts from, and the files a result takes over from it unchanged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.families import detect
from finetune.families.common import vocab_size
from finetune.families.family import Family
from finetune.families.settings import DOWNSAMPLE_MODE
from finetune.model_folders import checkpoint_folder
from finetune.model_folders.checkpoint_folder import is_adapter, local_folder, read_settings
from finetune.models.downsample_mode import Mode, decide, with_mode, write_mode
from finetune.models.strict_loading import check_unquantised
from finetune.utils.errors import CheckpointError
from finetune.utils.paths import expand

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
    "video_preprocessor_config.json",
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
        mode: how many patches become a token in this run; None for families that know one way.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    family: Family
    mode: Mode | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """config.json and, where the folder describes them, the settings of its processors by their names.

        See ``model_folders.checkpoint_folder.read_settings``. The decided downsample_mode stands in all of them.
        """
        return with_mode(read_settings(self.folder, self.config), self.mode)

    @property
    def downsample_mode(self) -> str | None:
        """Name of the mode; the network is loaded with it."""
        return None if self.mode is None else self.mode.name

    @property
    def mark(self) -> dict[str, str]:
        """What an adapter's auto_mapping says of it beside the class of the base: AutoPeftModel passes over it."""
        return {} if self.mode is None else {DOWNSAMPLE_MODE: self.mode.name}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return vocab_size(self.config)


def resolve(
    model_name_or_path: str,
    downsample_mode: str | None = None,
    *,
    trained: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Checkpoint:
    """Finds the checkpoint; a hub id (no such folder, form "owner/name") is downloaded.

    Args:
        model_name_or_path: folder or hub id.
        downsample_mode: of the flag, None where it is not given; see ``models.downsample_mode.decide``.
        trained: adapter or checkpoint of a training on it, whose mode counts before that of the base.
        environment: where the variable of the published guides may be set.

    Raises:
        CheckpointError: no such folder, or a folder without config.json or with quantised weights, or an unknown mode.
        ArgumentError: a mode that the family does not have.
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    folder = local_folder(model_name_or_path)
    hub = not expand(model_name_or_path).is_dir()
    # A downloaded snapshot lies in a folder named after its commit.
    name, revision = (model_name_or_path, folder.name) if hub else (str(folder), None)
    if is_adapter(folder):
        raise CheckpointError(f"{folder} is an adapter; training starts from its base checkpoint")
    config = read_config(folder)
    family = detect(config)
    mode = decide(family, config, folder, downsample_mode, trained=trained, environment=environment)
    return Checkpoint(folder, name, revision, config, family, mode)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: it or a file beside it is not what it should be, or the weights beside it are quantised.
    """
    check_unquantised(folder)  # first: a folder of GGUF files alone has no config.json
    return checkpoint_folder.read_config(folder)


def side_files(base: Checkpoint, *, use_lora: bool) -> list[str]:
    """Names of the files that a result takes over from its base."""
    return _matching(base.folder, SIDE_FILES if use_lora else FULL_FILES)


def take_over(base: Checkpoint, target: Path, patterns: tuple[str, ...]) -> None:
    """Copies files of a base byte for byte; only its downsample_mode becomes that of the run, where they differ."""
    copy_files(base.folder, target, patterns)
    if base.mode is not None:
        write_mode(target, base.family, base.mode.name)


def but_mode(base: Checkpoint) -> str:
    """For cards of results: that their files are those of the base but for the mode; empty where that is the same."""
    if base.mode is None or base.mode.name == base.mode.base:
        return ""
    return f", with {DOWNSAMPLE_MODE} {base.mode.name} in place of {base.mode.base}"


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copies the files of ``source`` that match, byte for byte; returns their names."""
    names = _matching(source, patterns)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
