"""Figures of the Trainer's log history: mean training loss and latest evaluation loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def mean_train_loss(history: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean training loss over all logged steps that were finite, those before a resume included; None without any."""
    total, steps, last = 0.0, 0, 0
    for entry in history:
        if "loss" in entry:
            if math.isfinite(entry["loss"]):
                total += entry["loss"] * (entry["step"] - last)
                steps += entry["step"] - last
            last = entry["step"]
    return total / steps if steps else None


def last_eval_loss(history: Iterable[Mapping[str, Any]]) -> float | None:
    """The latest evaluation loss; None when nothing was evaluated."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return losses[-1] if losses else None
