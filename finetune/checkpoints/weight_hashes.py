"""Hashes of trained weights, to compare them bit by bit: 16-bit logits do not reveal a single wrong layer."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def fingerprints(model: nn.Module, names: list[str], dtype: torch.dtype, *, wanted: bool = True) -> dict[str, str]:
    """A digest of some parameters by name, and the scale of every LoRA layer.

    Args:
        model: the model; with ZeRO-3 every rank must call, as the weights are gathered one by one.
        names: names of parameters; those that the model does not have are skipped.
        dtype: dtype to which values are cast first, so that float32 master weights and the dtype of a file make no
            difference.
        wanted: False on a rank that only takes part in gathering.
    """
    found, parameters = {}, dict(model.named_parameters())
    for name in names:
        if name in parameters:
            with _gathered(parameters[name]):
                if wanted:
                    found[name] = _digest(parameters[name], dtype)
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found |= {f"{path}.scaling.{adapter}": repr(scale) for adapter, scale in module.scaling.items()}
    return found


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Gathers a parameter that ZeRO-3 has partitioned."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _digest(parameter: nn.Parameter, dtype: torch.dtype) -> str:
    values = parameter.detach().flatten().to(dtype).cpu()
    return hashlib.blake2b(values.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
