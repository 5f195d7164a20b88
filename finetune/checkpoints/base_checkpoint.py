"""The base checkpoint of a run, and the tokenizer and processor files that are copied from it into results."""

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
# A full checkpoint also has the configuration of the model and the code that official loaders run.
FULL_FILES = (*SIDE_FILES, "config.json", "*.py")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base checkpoint on this machine.

    Attributes:
        folder: absolute path.
        name: the name recorded in adapters: the absolute folder, or the hub id.
        revision: commit of the hub id, None for a folder.
        config: config.json as a dictionary, exactly as read.
        family: the generation it belongs to.
        mode: downsample_mode of this run; None for families without one.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    family: Family
    mode: Mode | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """config.json with the settings of the processors, by processor, as far as the folder has them.

        See ``model_folders.checkpoint_folder.read_settings``. All of them have the downsample_mode of the run.
        """
        return with_mode(read_settings(self.folder, self.config), self.mode)

    @property
    def downsample_mode(self) -> str | None:
        """Name of the mode that the model is loaded with."""
        return None if self.mode is None else self.mode.name

    @property
    def auto_mapping_extra(self) -> dict[str, str]:
        """The mode as an extra key of an adapter's auto_mapping, which AutoPeftModel ignores."""
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
        downsample_mode: value of the flag, None if it is not given; see ``models.downsample_mode.decide``.
        trained: adapter or checkpoint trained on it, whose mode takes precedence over that of the base.
        environment: environment variables, one of which may set the mode.

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
        CheckpointError: it or another JSON file of the folder is invalid, or the weights are quantised.
    """
    check_unquantised(folder)  # first: a folder of GGUF files alone has no config.json
    return checkpoint_folder.read_config(folder)


def side_files(base: Checkpoint, *, use_lora: bool) -> list[str]:
    """Names of the files that are copied from the base into a result."""
    return _matching(base.folder, SIDE_FILES if use_lora else FULL_FILES)


def copy_base_files(base: Checkpoint, target: Path, patterns: tuple[str, ...]) -> None:
    """Copies files of the base byte for byte; only the downsample_mode in them is set to that of the run."""
    copy_files(base.folder, target, patterns)
    if base.mode is not None:
        write_mode(target, base.family, base.mode.name)


def mode_note(base: Checkpoint) -> str:
    """The difference of the mode from that of the base, for model cards; empty if there is none."""
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
