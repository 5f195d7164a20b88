"""Flags that commands share with training: name, type, choices, default and help come from its dataclasses."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from finetune.arguments.data import VIDEO_FLAGS, DataArguments
from finetune.arguments.model import ModelArguments

MODE_FLAG = "downsample_mode"
"""How many patches become a token, of ModelArguments."""

PLACE_FLAGS = ("dataset_dir", "media_dir", "image_root", "data_format", "strict_paths")
"""Where data are and what form they have."""

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def add_flags(parser: argparse._ActionsContainer, dataclass: type, names: Iterable[str]) -> None:
    """Adds flags of one of the dataclasses of training, in the order they have there.

    Args:
        parser: a parser, or a group of one.
        dataclass: ModelArguments or DataArguments.
        names: which of its flags.
    """
    wanted, types = set(names), get_type_hints(dataclass)
    for entry in fields(dataclass):
        if entry.name in wanted:
            wanted.remove(entry.name)
            default = None if entry.name == "model_name_or_path" else entry.default
            parser.add_argument(f"--{entry.name}", default=default, **_options(entry, types[entry.name]))
    if wanted:
        raise ValueError(f"{dataclass.__name__} has no {', '.join(sorted(wanted))}")


def add_mode_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --downsample_mode; unknown modes are refused where the mode is decided, ``models.downsample_mode``."""
    add_flags(parser, ModelArguments, [MODE_FLAG])


def add_video_flags(parser: argparse.ArgumentParser) -> None:
    """Adds those about videos; they must be those of the training for results to be those of the training."""
    add_flags(parser.add_argument_group("videos, as in training"), DataArguments, VIDEO_FLAGS)


def data_arguments(given: argparse.Namespace) -> DataArguments:
    """The flags about data as training has them; those that a command does not take keep their defaults.

    Raises:
        ArgumentError: a value outside of its range.
    """
    names = [entry.name for entry in fields(DataArguments) if hasattr(given, entry.name)]
    return DataArguments(**{name: getattr(given, name) for name in names})


def _options(entry: Field[Any], annotation: Any) -> dict[str, Any]:
    """How argparse takes a value of a field."""
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


def truth(word: str) -> bool:
    """A word for true or false.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if word.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"{word!r}: true or false is wanted")
    return word.lower() in _TRUE
