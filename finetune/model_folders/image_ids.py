"""Resolves use_image_id (whether ``<image_id>0</image_id>`` precedes an image) from flag, adapter and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.families import FAMILIES
from finetune.families.family import Config, Family
from finetune.families.settings import FILES, PROCESSORS, value_of
from finetune.model_folders.checkpoint_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    has_adapter,
    read_adapter_config,
    read_settings,
)
from finetune.model_folders.setting_files import write_setting
from finetune.utils.errors import ArgumentError, CheckpointError
from finetune.utils.json_objects import read_object

USE_IMAGE_ID = "use_image_id"
FLAG = f"--{USE_IMAGE_ID}"


@dataclass(frozen=True, slots=True)
class ImageIds:
    """Whether images are numbered in the prompts of a run.

    Attributes:
        used: whether they are.
        origin: the flag, or the folder that says so.
        base: the value of the base checkpoint.
    """

    used: bool
    origin: str
    base: bool

    @property
    def changed(self) -> bool:
        """Whether it differs from the base."""
        return self.used != self.base

    @property
    def chosen(self) -> bool:
        """Whether it was set by the flag."""
        return self.origin == FLAG

    def __str__(self) -> str:
        other = f"; the base says {str(self.base).lower()}" if self.changed else ""
        return f"{USE_IMAGE_ID} {str(self.used).lower()} ({self.origin}{other})"


def decide_image_ids(
    family: Family, settings: Config, folder: Path | None, wish: bool | None, trained: Path | None = None
) -> ImageIds | None:
    """The value of a run: that of the flag, else of what was trained, else of the base; None for a family without ids.

    Args:
        family: the generation.
        settings: config.json of the base with the settings of its processors (``read_settings``).
        folder: folder of the base, for messages.
        wish: value of the flag, None if it is not given.
        trained: folder of an adapter or checkpoint trained on the base, which takes precedence over the base.

    Raises:
        ArgumentError: the flag is given for a family without image ids.
        CheckpointError: an adapter records something else than true or false.
    """
    if USE_IMAGE_ID not in family.settings:
        if wish is None:
            return None
        able = ", ".join(each.title for each in FAMILIES if USE_IMAGE_ID in each.settings)
        raise ArgumentError(
            f"{FLAG} {str(wish).lower()}: {family.title} does not number images ({able} do); omit the flag"
        )
    base = bool(value_of(settings, family.settings[USE_IMAGE_ID]))
    if wish is not None:
        return ImageIds(wish, FLAG, base)
    if trained is not None and (saved := _saved_with(family, trained)) is not None:
        return ImageIds(saved, str(trained), base)
    return ImageIds(base, str(folder or family.title), base)


def with_image_ids(settings: Config, family: Family, used: bool | None) -> dict[str, Any]:
    """Settings in which images are numbered or not; None, and families without image ids, change nothing."""
    if used is None or USE_IMAGE_ID not in family.settings:
        return dict(settings)
    processor = settings.get("image_processor")
    processors = {"image_processor": {**processor, USE_IMAGE_ID: used}} if processor else {}
    return {**settings, **processors, USE_IMAGE_ID: used}


def write_image_ids(folder: Path, family: Family, used: bool) -> None:
    """Sets the value in the image processor's file of a folder, and in config.json if that has it or is the only one.

    Nothing else in them changes; a file that has the value already is not written.
    """
    default = next(place.default for place in family.settings[USE_IMAGE_ID].places if place.file == "image_processor")
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else None
    settings = read_settings(folder, config or {})
    parts: dict[str, set[str]] = {}
    for processor in ("image_processor", "video_processor"):
        # transformers goes by the image processor; that of videos may have the key too.
        if (held := settings.get(processor)) and (processor == "image_processor" or USE_IMAGE_ID in held):
            file, _, section = settings[FILES][processor].partition(", ")
            parts.setdefault(file, set()).add(section)
    write_setting(folder, USE_IMAGE_ID, used, parts, default)
    if config is not None and ("image_processor" not in settings or USE_IMAGE_ID in config):
        write_setting(folder, USE_IMAGE_ID, used, {CONFIG: {""}}, None)


def recorded(auto_mapping: Mapping[str, Any] | None, where: str) -> bool | None:
    """The value that training has recorded in an adapter's auto_mapping; None without one.

    Raises:
        CheckpointError: it is something else than true or false.
    """
    value = (auto_mapping or {}).get(USE_IMAGE_ID)
    if value is None or isinstance(value, bool):
        return value
    raise CheckpointError(f"{where}: auto_mapping has {USE_IMAGE_ID} {value!r}; it is true or false")


def _saved_with(family: Family, trained: Path) -> bool | None:
    """The value that a result records; None for one that has no settings of its own."""
    if has_adapter(trained):
        mapping = read_adapter_config(trained).get("auto_mapping")
        if (value := recorded(mapping, str(trained / ADAPTER_CONFIG))) is not None:
            return value
    config = read_object(trained / CONFIG) if (trained / CONFIG).is_file() else {}
    settings = read_settings(trained, config)
    held = any(settings.get(processor) for processor in PROCESSORS) or USE_IMAGE_ID in config
    return bool(value_of(settings, family.settings[USE_IMAGE_ID])) if held else None
