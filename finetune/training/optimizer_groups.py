"""Optimizer parameter groups: a learning rate per part of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def split_groups(optimizer: torch.optim.Optimizer, rate_of: Mapping[int, float]) -> None:
    """Splits the parameter groups of an optimizer by learning rate, and merges groups with equal options.

    The fewer groups the better: DeepSpeed's work and communication per step grow with their number.

    Args:
        optimizer: as the Trainer makes it, with one group per weight decay.
        rate_of: learning rate by the ``id`` of the parameter.
    """
    merged: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            wanted = {**options, "lr": rate_of[id(parameter)]}
            parameters = next((found for given, found in merged if given == wanted), None)
            if parameters is None:
                merged.append((wanted, parameters := []))
            parameters.append(parameter)
    optimizer.param_groups.clear()
    for options, parameters in merged:
        optimizer.add_param_group({**options, "params": parameters})
