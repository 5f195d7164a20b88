"""Resolves downsample_mode ("16x" or "4x": vision patches per token) from flag, environment, adapter and checkpoint.

In published inference it is set twice: the model merges patches by config.json, and the processors count placeholders
by their own files. Here one value is used for both: that of the flag, else of the environment variable of the published
finetuning guides, else of the files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.families import FAMILIES
from finetune.families.common import merge_of
from finetune.families.family import Config, Family
from finetune.families.settings import DOWNSAMPLE_MODE, FILES, PROCESSORS, Found, Processor
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
from finetune.utils.log_once import warn_once

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

FLAG = f"--{DOWNSAMPLE_MODE}"
VARIABLE = "DOWNSAMPLE_MODE"
_ENVIRONMENT = f"environment variable {VARIABLE}"
_COUNTING: tuple[Processor, ...] = ("image_processor", "video_processor")


@dataclass(frozen=True, slots=True)
class Mode:
    """A decided mode.

    Attributes:
        name: "16x" or "4x".
        origin: source of the value: the flag, the environment variable, or a file.
        overruled: sources with another value, for messages; empty if there are none.
        base: the mode of the files of the base checkpoint.
    """

    name: str
    origin: str
    overruled: str
    base: str

    @property
    def chosen(self) -> bool:
        """Whether it was set by the flag or by the environment variable."""
        return self.origin in (FLAG, _ENVIRONMENT)

    def __str__(self) -> str:
        return f"{DOWNSAMPLE_MODE} {self.name} ({self.origin}{f'; {self.overruled}' if self.overruled else ''})"


def decide(
    family: Family,
    config: Config,
    folder: Path | None,
    wish: str | None = None,
    *,
    trained: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Mode | None:
    """The mode of a run; None for a family without modes.

    Args:
        family: the generation.
        config: config.json of the base checkpoint.
        folder: folder of the base checkpoint; None if all settings are in ``config``.
        wish: value of the flag, None if it is not given.
        trained: folder of an adapter or checkpoint trained on the base, which takes precedence over the base.
        environment: environment variables, one of which may set the mode.

    Raises:
        ArgumentError: the flag is given for a family without modes, or flag or variable have an unknown value.
        CheckpointError: a file has an unknown value.
    """
    variable = environment.get(VARIABLE) or None
    if DOWNSAMPLE_MODE not in family.settings:
        _refuse_or_warn(family, wish, variable)
        return None
    settings = config if folder is None else read_settings(folder, config)
    base, doubt = _in_files(family, settings, "" if folder is None else f"{folder}/")
    result = None if trained is None else _in_result(trained, settings)
    asked = [Found(wish, FLAG), Found(variable, _ENVIRONMENT)]
    used, *others = [found for found in (*asked, result, base) if found is not None and found.value is not None]
    for found in (used, base, result or base):
        _check(found)
    if doubt and used is base:
        warn_once(logger, doubt)
    differing = [f"{other.where} says {other.value}" for other in others if other.value != used.value]
    return Mode(used.value, used.where, ", ".join(differing), base.value)


def with_mode(settings: Config, mode: Mode | None) -> dict[str, Any]:
    """Settings with the mode in config and all processors."""
    if mode is None:
        return dict(settings)
    given = {DOWNSAMPLE_MODE: mode.name}
    processors = {name: {**settings[name], **given} for name in _COUNTING if settings.get(name)}
    return {**settings, **processors, **given}


@contextmanager
def working_in(model: nn.Module, name: str | None) -> Iterator[None]:
    """Sets the mode of a model for a while; None changes nothing.

    By its configuration: an argument of ``generate`` would be dropped after the images are encoded.
    """
    config: Any = model.config
    if name is None:
        yield
        return
    before = getattr(config, DOWNSAMPLE_MODE)
    setattr(config, DOWNSAMPLE_MODE, name)
    try:
        yield
    finally:
        setattr(config, DOWNSAMPLE_MODE, before)


def saved_with(folder: Path) -> str | None:
    """The mode recorded in an adapter or full checkpoint by its training; None if there is none.

    Raises:
        CheckpointError: a file is not JSON.
    """
    if has_adapter(folder):
        return (read_adapter_config(folder).get("auto_mapping") or {}).get(DOWNSAMPLE_MODE)
    return read_object(file).get(DOWNSAMPLE_MODE) if (file := folder / CONFIG).is_file() else None


def write_mode(folder: Path, family: Family, name: str) -> None:
    """Sets the mode in config.json and the processor files of a folder, as far as it has them.

    Nothing else in them changes; a file that has the mode already is not written.
    """
    parts: dict[str, set[str]] = {CONFIG: {""}}
    for processor in _COUNTING:
        for file, key in PROCESSORS[processor]:
            parts.setdefault(file, set()).add(key)
    write_setting(folder, DOWNSAMPLE_MODE, name, parts, family.settings[DOWNSAMPLE_MODE].default)


def _refuse_or_warn(family: Family, wish: str | None, variable: str | None) -> None:
    able = ", ".join(each.title for each in FAMILIES if DOWNSAMPLE_MODE in each.settings)
    why = f"{family.title} has no downsample modes ({able} have)"
    if wish is not None:
        raise ArgumentError(f"{FLAG} {wish}: {why}; omit the flag")
    if variable is not None:
        warn_once(logger, f"{_ENVIRONMENT}={variable} has no effect: {why}")


def _check(found: Found) -> None:
    try:
        merge_of(found.value)
    except CheckpointError as error:
        kind = ArgumentError if found.where in (FLAG, _ENVIRONMENT) else CheckpointError
        raise kind(f"{found.where}: {error}") from error


def _held(settings: Config) -> list[Found]:
    """The values in config.json and the processors; None for a missing key."""
    names = settings.get(FILES) or {}
    processors = {name: settings[name] for name in _COUNTING if settings.get(name)}
    return [
        Found(settings.get(DOWNSAMPLE_MODE), CONFIG),
        *(Found(given.get(DOWNSAMPLE_MODE), names.get(name, name)) for name, given in processors.items()),
    ]


def _in_files(family: Family, settings: Config, place: str) -> tuple[Found, str]:
    """The mode of the files of a checkpoint, and a message if they disagree."""
    default = family.settings[DOWNSAMPLE_MODE].default
    held = _held(settings)
    first = next((found for found in held if found.value is not None), Found(default, f"default of {family.title}"))
    used = Found(first.value, f"{place}{first.where}" if first in held else first.where)
    others = [
        f"{found.value} in {found.where}" if found.value else f"{default}, the default, in {found.where}"
        for found in held
        if (found.value or default) != used.value
    ]
    if not others:
        return used, ""
    return used, (
        f"{used.where}: {DOWNSAMPLE_MODE} is {used.value}, but {' and '.join(others)}; published inference fails on "
        f"images of such a folder. {used.value} is used for all of them; {FLAG} overrides it"
    )


def _in_result(trained: Path, base: Config) -> Found | None:
    """The mode of the files of a result, if it differs from that of the base."""
    if has_adapter(trained) and (name := saved_with(trained)) is not None:
        return Found(name, str(trained / ADAPTER_CONFIG))
    config = read_object(trained / CONFIG) if (trained / CONFIG).is_file() else {}
    before = {found.where: found.value for found in _held(base)}
    for found in _held(read_settings(trained, config)):
        if found.value is not None and found.value != before.get(found.where):
            return Found(found.value, str(trained / found.where))
    return None
