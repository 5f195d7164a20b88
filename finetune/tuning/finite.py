"""Whether weights are finite, in memory and in files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

# Types whose extremes torch computes on every device.
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def nonfinite_weights(model: nn.Module, *, trained_only: bool) -> list[str]:
    """Names of parameters that hold a value that is not finite; under ZeRO-3 of those whose own part does.

    Args:
        model: the network.
        trained_only: look at those that train alone; nothing else is saved of an adapter.
    """
    chosen = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not trained_only]
    # DeepSpeed leaves parameters that ZeRO-3 has partitioned empty; each rank has its part in ds_tensor.
    flags = [_is_finite(getattr(parameter, "ds_tensor", parameter).detach()) for _, parameter in chosen]
    by_device: dict[torch.device, list[int]] = {}
    for place, flag in enumerate(flags):
        by_device.setdefault(flag.device, []).append(place)
    bad = []
    for places in by_device.values():  # one wait per device
        finite = torch.stack([flags[place] for place in places]).tolist()
        bad += [place for place, good in zip(places, finite, strict=True) if not good]
    return [chosen[place][0] for place in sorted(bad)]


def nonfinite_tensors(files: Iterable[Path]) -> list[str]:
    """Names of tensors in safetensors files that hold a value that is not finite.

    Raises:
        safetensors.SafetensorError: a file is damaged.
    """
    bad = []
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            bad += [name for name in names if not bool(_is_finite(file.get_tensor(name)))]
    return bad


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A scalar; by the extremes, which take no memory of the tensor's size and hand NaN on."""
    if tensor.dtype not in _TYPES or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)
