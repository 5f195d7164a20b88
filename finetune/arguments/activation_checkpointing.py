"""The flags of gradient checkpointing under their old and new names in transformers.

Published launchers use ``gradient_checkpointing``; from 5.23 on transformers reads ``activation_checkpointing``.
"""

from __future__ import annotations

from typing import Any

from finetune.utils.errors import ArgumentError

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def copy_to_new_names(training: Any) -> None:
    """Copies values given under the old flag names to the new ones, if the installed transformers has them.

    Raises:
        ArgumentError: both were given, with different values.
    """
    for old, new in _RENAMED.items():
        value = getattr(training, old)
        if value is None or not hasattr(training, new):
            continue
        if getattr(training, new) not in (None, value):
            raise ArgumentError(f"--{old} {value} and --{new} {getattr(training, new)} are one flag: give one of them")
        setattr(training, new, value)


def set_checkpointing(training: Any, on: bool) -> None:
    """Switches gradient checkpointing on or off after the flags were parsed."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(training, name):
            setattr(training, name, on)
