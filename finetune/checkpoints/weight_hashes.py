"""Whether weights are those that were trained, to the bit: logits in 16 bit do not show a single wrong layer."""

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
        model: the network; under ZeRO-3 every rank must call, as the weights are gathered one by one.
        names: of its parameters; those it does not have are left out.
        dtype: to which values are rounded first, so that neither float32 masters nor the type of a file make a
            difference.
        wanted: False on a rank that only helps to gather.
    """
    found, parameters = {}, dict(model.named_parameters())
    for name in names:
        if name in parameters:
            with _whole(parameters[name]):
                if wanted:
                    found[name] = _digest(parameters[name], dtype)
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found |= {f"{path}.scaling.{adapter}": repr(scale) for adapter, scale in module.scaling.items()}
    return found


def _whole(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Gathers a parameter that ZeRO-3 has partitioned."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _digest(parameter: nn.Parameter, dtype: torch.dtype) -> str:
    values = parameter.detach().flatten().to(dtype).cpu()
    return hashlib.blake2b(values.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
