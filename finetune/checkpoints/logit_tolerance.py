"""Tolerance for comparing logits, measured from the effect of rounding on the prompts that are compared.

A constant would be too loose or too tight: in bfloat16 the rounding error of logits is 1 % of the largest logit in one
model, and 10 % in a deeper or less trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Tolerance in float32 for sums in another order, relative to the largest logit; a wrong weight changes far more.
FLOAT32 = 1e-4
_LOW = (torch.bfloat16, torch.float16)


def computing_noise(model: nn.Module, compute_logits: Callable[[], torch.Tensor], logits: torch.Tensor) -> float:
    """How far logits change when the output of every layer is rounded once more, as with other kernels and devices.

    The model is not changed; its weights may be sharded, quantised to 4 bit or wrapped by adapters.

    Args:
        model: in the dtypes in which the result will be used.
        compute_logits: runs the model again.
        logits: its result before.

    Returns:
        The largest absolute difference; 0 in float32.
    """
    if not any(parameter.dtype in _LOW for parameter in model.parameters()):
        return 0.0
    with _extra_rounding(model):
        return (compute_logits() - logits).abs().max().item()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts weights in place to the dtypes that they have when the result is loaded in a 16-bit ``dtype``.

    Those are ``dtype``, and float32 for LoRA, as peft loads it on any base. Weights partitioned by ZeRO-3 are 16 bit
    already.
    """
    if dtype not in _LOW:
        return
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if ".lora_" in name else dtype
        partitioned = hasattr(parameter, "ds_id")
        if not partitioned and parameter.dtype != wanted and parameter.dtype in (*_LOW, torch.float32):
            parameter.grad = None
            parameter.data = parameter.data.to(wanted)


@contextmanager
def _extra_rounding(model: nn.Module) -> Iterator[None]:
    """Changes every 16-bit output of a layer by up to half a unit in the last place, with a fixed seed."""
    generators: dict[torch.device, torch.Generator] = {}

    def moved(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or output.dtype not in _LOW:
            return output
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        unit = torch.finfo(output.dtype).eps
        shift = torch.rand(output.shape, generator=generators[device], device=device).sub_(0.5).mul_(unit)
        return output.float().mul_(shift.add_(1)).to(output.dtype)

    layers = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [layer.register_forward_hook(moved) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
