"""The flag about downsampling, for commands with a parser of their own: as finetune.py has it."""

from __future__ import annotations

import argparse
from dataclasses import fields

from finetune.flags import ModelArguments


def add_mode_flag(parser: argparse.ArgumentParser) -> None:
    """Adds it; unknown modes are refused where the mode is decided, ``models.modes``."""
    entry = next(entry for entry in fields(ModelArguments) if entry.name == "downsample_mode")
    parser.add_argument(f"--{entry.name}", metavar="16x|4x", help=entry.metadata["help"])
