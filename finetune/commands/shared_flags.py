"""Flags that commands share with training, built from its argument dataclasses."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from finetune.arguments.data import VIDEO_FLAGS, DataArguments
from finetune.arguments.model import ModelArguments

PROMPT_FLAGS = ("downsample_mode", "use_image_id")
"""Flags of ModelArguments for settings of the checkpoint that the run may replace."""

PLACE_FLAGS = ("dataset_dir", "media_dir", "image_root", "data_format", "strict_paths")
"""Flags that locate the data and name its format."""

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def add_flags(parser: argparse._ActionsContainer, dataclass: type, names: Iterable[str]) -> None:
    """Adds flags of an argument dataclass, in its order.

    Args:
        parser: a parser, or a group of one.
        dataclass: ModelArguments or DataArguments.
        names: the flags to add.
    """
    wanted, types = set(names), get_type_hints(dataclass)
    for entry in fields(dataclass):
        if entry.name in wanted:
            wanted.remove(entry.name)
            default = None if entry.name == "model_name_or_path" else entry.default
            parser.add_argument(f"--{entry.name}", default=default, **_options(entry, types[entry.name]))
    if wanted:
        raise ValueError(f"{dataclass.__name__} has no {', '.join(sorted(wanted))}")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --downsample_mode and --use_image_id, which ``base_checkpoint.resolve_base`` takes and validates."""
    add_flags(parser, ModelArguments, PROMPT_FLAGS)


def add_video_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of video sampling; use the values of training to reproduce its inputs."""
    add_flags(parser.add_argument_group("videos, as in training"), DataArguments, VIDEO_FLAGS)


def data_arguments(given: argparse.Namespace) -> DataArguments:
    """DataArguments of a command; flags that it does not have keep their defaults.

    Raises:
        ArgumentError: a value out of range.
    """
    names = [entry.name for entry in fields(DataArguments) if hasattr(given, entry.name)]
    return DataArguments(**{name: getattr(given, name) for name in names})


def _options(entry: Field[Any], annotation: Any) -> dict[str, Any]:
    """Argparse options for a dataclass field."""
    kinds = [kind for kind in (get_args(annotation) if isinstance(annotation, UnionType) else (annotation,))]
    kind = next(kind for kind in kinds if kind is not type(None))
    options: dict[str, Any] = {"help": entry.metadata["help"].replace("%", "%%")}
    if kind is bool:
        return {**options, "type": truth, "nargs": "?", "const": True, "metavar": "true|false"}
    if get_origin(kind) is Literal:
        return {**options, "choices": list(get_args(kind))}
    if "choices" in entry.metadata:
        return {**options, "choices": entry.metadata["choices"]}
    return options if kind is str else {**options, "type": kind}


def truth(value: str) -> bool:
    """Parses a boolean flag value.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if value.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"{value!r}: must be true or false")
    return value.lower() in _TRUE


def positive(value: str) -> int:
    """Parses an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"{value!r}: must be an integer of at least 1")
    return int(value)
