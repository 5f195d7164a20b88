"""The flags about videos, for commands with a parser of their own: as finetune.py has them."""

from __future__ import annotations

import argparse
from dataclasses import fields

from finetune.flags import VIDEO_FLAGS, DataArguments
from finetune.media.sampling import VideoOptions


def add_video_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them; they must be those of the training for its results to be those of the training."""
    group = parser.add_argument_group("videos, as in training")
    for entry in fields(DataArguments):
        if entry.name not in VIDEO_FLAGS:
            continue
        flag, said = f"--{entry.name}", entry.metadata["help"]
        if "bool" in str(entry.type):  # transformers resolves the annotations of what it parses
            group.add_argument(flag, action="store_true", help=said)
        else:
            group.add_argument(flag, type=float if "float" in str(entry.type) else int, help=said)


def video_options(given: argparse.Namespace) -> VideoOptions:
    """What the flags say.

    Raises:
        ArgumentError: a value of 0 or less.
    """
    return DataArguments(**{name: getattr(given, name) for name in VIDEO_FLAGS}).video_options
