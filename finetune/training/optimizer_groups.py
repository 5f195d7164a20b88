"""Optimizer parameter groups: a learning rate per part of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def split_groups(
    optimizer: torch.optim.Optimizer, part_of: Mapping[int, str], rates: Mapping[str, float]
) -> tuple[str, ...]:
    """Splits the parameter groups of an optimizer by part, and merges groups with equal options.

    The fewer groups the better: DeepSpeed's work and communication per step grow with their number. One group never has
    two parts, so that a gradient norm per part can be measured where DeepSpeed keeps a group as one flat tensor.

    Args:
        optimizer: as the Trainer makes it, with one group per weight decay.
        part_of: part by the ``id`` of the parameter.
        rates: learning rate by part.

    Returns:
        The part of each group.
    """
    merged: list[tuple[str, dict[str, Any], list[nn.Parameter]]] = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            part = part_of[id(parameter)]
            wanted = {**options, "lr": rates[part]}
            parameters = next((found for its, given, found in merged if (its, given) == (part, wanted)), None)
            if parameters is None:
                merged.append((part, wanted, parameters := []))
            parameters.append(parameter)
    optimizer.param_groups.clear()
    for _, options, parameters in merged:
        optimizer.add_param_group({**options, "params": parameters})
    return tuple(part for part, _, _ in merged)
