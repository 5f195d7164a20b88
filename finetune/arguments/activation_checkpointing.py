"""Activation checkpointing under both of its names in transformers.

Published launchers say ``gradient_checkpointing``; from 5.23 on transformers reads ``activation_checkpointing``.
"""

from __future__ import annotations

from typing import Any

from finetune.utils.errors import ArgumentError

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def hand_over(training: Any) -> None:
    """Gives flags that were parsed under the old name the new one, where the installed transformers has it.

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
    """Says whether layers are run again, after the flags were parsed."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(training, name):
            setattr(training, name, on)
