"""What rounding does to logits, measured on the prompts at hand: how far those may be apart that should be equal.

A constant would be wrong both ways: in bfloat16 the logits of one network are certain to 1 % of the largest, those of
another, deeper or less trained, to 10 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Of float32 sums in another order, relative to the largest logit; what a wrong weight does is far above.
FLOAT32 = 1e-4
_LOW = (torch.bfloat16, torch.float16)


def computing_noise(model: nn.Module, ask: Callable[[], torch.Tensor], logits: torch.Tensor) -> float:
    """How far logits move when every layer rounds its result once more, as other kernels, devices and batches do.

    Nothing of the model changes, and its weights may be partitioned, packed to 4 bit or under adapters.

    Args:
        model: in the types in which its result will be used.
        ask: gives the logits anew.
        logits: what it gave before.

    Returns:
        The largest absolute difference; 0 in float32.
    """
    if not any(parameter.dtype in _LOW for parameter in model.parameters()):
        return 0.0
    with _rounded_again(model):
        return (ask() - logits).abs().max().item()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives weights the types that they have in a process which loads the result in a 16-bit ``dtype``, in place.

    Those are ``dtype``, and float32 for LoRA, as peft keeps it beside any base. What ZeRO-3 has partitioned stays: it
    is 16 bit already.
    """
    if dtype not in _LOW:
        return
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if ".lora_" in name else dtype
        whole = not hasattr(parameter, "ds_id")
        if whole and parameter.dtype != wanted and parameter.dtype in (*_LOW, torch.float32):
            parameter.grad = None
            parameter.data = parameter.data.to(wanted)


@contextmanager
def _rounded_again(model: nn.Module) -> Iterator[None]:
    """Moves every 16-bit result of a layer by up to half a unit in its last place, the same way each time."""
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
