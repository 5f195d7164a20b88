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
from finetune.model_folders.checkpoint_folder import read_settings, refuse_adapter, resolve_folder
from finetune.model_folders.downsample_mode import Mode, decide, with_mode, write_mode
from finetune.model_folders.duplex_prompt import (
    O45_FC,
    DuplexPrompt,
    decide_duplex_prompt,
    recorded_as,
    write_duplex_prompt,
)
from finetune.model_folders.image_ids import USE_IMAGE_ID, ImageIds, decide_image_ids, with_image_ids, write_image_ids
from finetune.model_folders.stored_4bit import stored_in_4bit
from finetune.model_folders.weight_headers import check_quantisation
from finetune.templates.duplex_fc import LAST_ID
from finetune.templates.prompt_types import DuplexName
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
class BaseCheckpoint:
    """A base checkpoint on this machine.

    Attributes:
        folder: absolute path.
        name: the name recorded in adapters: the absolute folder, or the hub id.
        revision: commit of the hub id, None for a folder.
        config: config.json as a dictionary, exactly as read.
        family: the generation it belongs to.
        mode: downsample_mode of this run; None for families without one.
        image_ids: whether images are numbered in this run; None for families that never do.
        duplex: the prompt o45_fc for full-duplex records; None for the native one.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    family: Family
    mode: Mode | None = None
    image_ids: ImageIds | None = None
    duplex: DuplexPrompt | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """config.json with the settings of the processors, by processor, as far as the folder has them.

        See ``model_folders.checkpoint_folder.read_settings``; with the downsample_mode and use_image_id of the run.
        """
        held = with_mode(read_settings(self.folder, self.config), self.mode)
        changed = self.image_ids is not None and self.image_ids.changed
        return with_image_ids(held, self.family, self.image_ids.used if self.image_ids and changed else None)

    @property
    def downsample_mode(self) -> str | None:
        """Name of the mode that the model is loaded with."""
        return None if self.mode is None else self.mode.name

    @property
    def auto_mapping_extra(self) -> dict[str, str | bool]:
        """Mode, changed image ids and duplex prompt, as keys of auto_mapping that AutoPeftModel ignores."""
        extra: dict[str, str | bool] = {} if self.mode is None else {DOWNSAMPLE_MODE: self.mode.name}
        if self.image_ids is not None and self.image_ids.changed:
            extra[USE_IMAGE_ID] = self.image_ids.used
        return extra if self.duplex is None else {**extra, **recorded_as()}

    @property
    def choices(self) -> list[str]:
        """What is said of the run beside its flags: mode, duplex prompt, and image ids that differ from the base."""
        said = [str(each) for each in (self.mode, self.duplex) if each is not None]
        return [*said, str(self.image_ids)] if self.image_ids is not None and self.image_ids.changed else said

    @property
    def in_4bit(self) -> bool:
        """Whether bitsandbytes stored its linear layers in 4 bit."""
        return stored_in_4bit(self.config)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table of the run."""
        return vocab_size(self.config) if self.duplex is None else LAST_ID

    @property
    def adds_duplex_rows(self) -> bool:
        """Whether the model of the run has rows that the weight files of the base do not have."""
        return self.duplex is not None and self.duplex.adds_rows

    @property
    def duplex_name(self) -> DuplexName:
        """Name of the prompt of full-duplex records."""
        return "native" if self.duplex is None else O45_FC


def resolve_base(
    model_name_or_path: str,
    downsample_mode: str | None = None,
    *,
    use_image_id: bool | None = None,
    duplex_prompt: str | None = None,
    trained: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> BaseCheckpoint:
    """Finds the checkpoint; a hub id (no such folder, form "owner/name") is downloaded.

    Args:
        model_name_or_path: folder or hub id.
        downsample_mode: value of the flag, None if it is not given; see ``model_folders.downsample_mode.decide``.
        use_image_id: value of the flag, None if it is not given; see ``model_folders.image_ids``.
        duplex_prompt: value of the flag, None if it is not given; see ``model_folders.duplex_prompt``.
        trained: adapter or checkpoint trained on it, whose values of these take precedence over those of the base.
        environment: environment variables, one of which may set the mode.

    Raises:
        CheckpointError: no such folder, or a folder without config.json or with weights that are
            quantised otherwise than in 4 bit, or an unknown mode.
        ArgumentError: a mode or image ids that the family does not have.
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    folder = resolve_folder(model_name_or_path)
    hub = not expand(model_name_or_path).is_dir()
    # A downloaded snapshot lies in a folder named after its commit.
    name, revision = (model_name_or_path, folder.name) if hub else (str(folder), None)
    refuse_adapter(folder)
    config = read_config(folder)
    family = detect(config)
    mode = decide(family, config, folder, downsample_mode, trained=trained, environment=environment)
    image_ids = decide_image_ids(family, read_settings(folder, config), folder, use_image_id, trained)
    duplex = decide_duplex_prompt(family, config, folder, duplex_prompt, trained)
    return BaseCheckpoint(folder, name, revision, config, family, mode, image_ids, duplex)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: it or another JSON file of the folder is invalid, or the weights are quantised
            otherwise than in 4 bit.
    """
    check_quantisation(folder)  # first: a folder of GGUF files alone has no config.json
    return checkpoint_folder.read_config(folder)


def side_files(base: BaseCheckpoint, *, use_lora: bool) -> list[str]:
    """Names of the files that are copied from the base into a result."""
    return _matching(base.folder, SIDE_FILES if use_lora else FULL_FILES)


def copy_base_files(base: BaseCheckpoint, target: Path, patterns: tuple[str, ...]) -> None:
    """Copies files of the base byte for byte but for downsample_mode, use_image_id and duplex prompt of the run."""
    copy_files(base.folder, target, patterns)
    if base.mode is not None:
        write_mode(target, base.family, base.mode.name)
    if base.image_ids is not None and base.image_ids.changed:
        write_image_ids(target, base.family, base.image_ids.used)
    if base.duplex is not None:
        write_duplex_prompt(target)


def changes_note(base: BaseCheckpoint) -> str:
    """What the files of a result say otherwise than those of the base, for model cards; empty if nothing."""
    changes = []
    if base.mode is not None and base.mode.name != base.mode.base:
        changes.append(f"{DOWNSAMPLE_MODE} {base.mode.name} in place of {base.mode.base}")
    if base.image_ids is not None and base.image_ids.changed:
        used, before = (str(value).lower() for value in (base.image_ids.used, base.image_ids.base))
        changes.append(f"{USE_IMAGE_ID} {used} in place of {before}")
    if base.duplex is not None:
        changes.append(f"the {LAST_ID} rows and the tokens of {base.duplex}")
    return f", with {' and '.join(changes)}" if changes else ""


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copies the files of ``source`` that match, byte for byte; returns their names."""
    names = _matching(source, patterns)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
