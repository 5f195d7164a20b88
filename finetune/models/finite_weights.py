"""Checks that weights are floating point and finite, in safetensors files and in loaded models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from finetune.utils.errors import CheckpointError

# Tables of positions and counters, which are not weights.
_COUNTERS = ("position_ids", "num_batches_tracked", "relative_position_index")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_REMEDY = "the file is damaged, or its training went wrong: download it again, or take an earlier checkpoint"


def check_types(path: Path, passthrough: Sequence[str] = ()) -> None:
    """Checks by the header of a safetensors file that its weights are floating point.

    Args:
        path: the file.
        passthrough: prefixes of the names of tensors that no model reads.

    Raises:
        CheckpointError: naming the first tensor that is not.
    """
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            if name.endswith(_COUNTERS) or name.startswith(tuple(passthrough)):
                continue
            if (kind := file.get_slice(name).get_dtype()) not in _FLOATS:
                raise CheckpointError(f"{path}: {name} is of type {kind}; weights are floating point: {_REMEDY}")


def check_file(path: Path) -> None:
    """Checks every value of a safetensors file, one tensor in memory at a time.

    Raises:
        CheckpointError: naming the first tensor with a value that is not finite.
    """
    with safe_open(str(path), framework="pt") as file:
        _refuse(path, (name for name in file.keys() if not finite(file.get_tensor(name))))  # noqa: SIM118 - as above


def check_finite_model(model: nn.Module, name: str, files: Sequence[Path]) -> None:
    """Checks the values of a loaded model; with ZeRO-3 every rank checks its shard, and all ranks get all names.

    Args:
        model: the loaded model.
        name: the checkpoint, for the message.
        files: its weight files, which are checked instead if the model has quantised weights (4 bit).

    Raises:
        CheckpointError: naming the first weight with a value that is not finite.
    """
    wrong = nonfinite_weights(model, trained_only=False)
    if any(hasattr(weight, "ds_tensor") for weight in model.parameters()) and dist.is_initialized():
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, wrong)
        wrong = [key for part in found for key in part]
    _refuse(name, wrong)
    if not all(_part(weight).is_floating_point() for weight in model.parameters()):
        for path in files:
            check_file(path)


def nonfinite_weights(model: nn.Module, *, trained_only: bool) -> list[str]:
    """Names of parameters with a value that is not finite; with ZeRO-3 in the shard of this rank.

    Args:
        model: the model.
        trained_only: check trained parameters only, as saved for an adapter.
    """
    chosen = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not trained_only]
    flags = [finite(_part(parameter)) for _, parameter in chosen]
    by_device: dict[torch.device, list[int]] = {}
    for place, flag in enumerate(flags):
        by_device.setdefault(flag.device, []).append(place)
    bad = []
    for places in by_device.values():  # one synchronisation per device
        good = torch.stack([flags[place] for place in places]).tolist()
        bad += [place for place, fine in zip(places, good, strict=True) if not fine]
    return [chosen[place][0] for place in sorted(bad)]


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all values are finite, as a scalar on the tensor's device; true for empty and integer tensors."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return torch.ones((), dtype=torch.bool, device="cpu" if tensor.is_meta else tensor.device)
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # One pass without a copy: with NaN both are NaN, and an infinity is one of them.
    low, high = torch.aminmax(tensor.detach())
    return torch.isfinite(low) & torch.isfinite(high)


def _part(parameter: torch.Tensor) -> torch.Tensor:
    """The shard of a parameter on this rank; the parameter itself if ZeRO-3 has not partitioned it."""
    return getattr(parameter, "ds_tensor", parameter)


def _refuse(name: str | Path, wrong: Iterable[str]) -> None:
    if (first := next(iter(wrong), None)) is not None:
        raise CheckpointError(f"{name}: {first} has values that are not finite (NaN or infinity): {_REMEDY}")
