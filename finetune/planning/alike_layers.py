"""Speeds up tracing: of identical layers only two are traced, and the rest reuse the figures of the second.

The first may differ: tensors that all layers share (masks, rotary tables) are counted where they are first saved.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.planning.traced_block import TracedBlock

_TRACED = 2


@dataclass(slots=True)
class _Known:
    """What is known of layers of a kind: how many were traced, the block and the output of the last of them."""

    traced: int = 0
    block: TracedBlock | None = None
    output: Any = None


@contextmanager
def shared(model: nn.Module, current: Any) -> Iterator[None]:
    """Skips the third and every later layer of a kind inside the context.

    Args:
        model: on the meta device.
        current: returns the block of the layer that is running.
    """
    known: dict[Hashable, _Known] = {}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = _Skipping(layer, known, current)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # that of its class is used again


class _Skipping:
    """The forward pass of a layer, or its stand-in where two layers alike have been traced."""

    def __init__(self, layer: nn.Module, known: dict[Hashable, _Known], current: Any) -> None:
        self._forward, self._known, self._current = layer.forward, known, current
        weights = tuple((name, _of(weight)) for name, weight in layer.named_parameters())
        self._kind = type(layer), str(getattr(layer, "layer_type", "")), weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        same = self._known.setdefault((*self._kind, _of(args), _of(kwargs)), _Known())
        block: TracedBlock = self._current()
        if same.traced < _TRACED or same.block is None:
            same.output = self._forward(*args, **kwargs)
            same.traced, same.block = same.traced + 1, block
            return same.output
        block.saved, block.widest, block.copies = same.block.saved, same.block.widest, same.block.copies
        return _like(same.output)


def _of(value: Any) -> Hashable:
    """What decides the memory of a value: shape, dtype and graph of tensors, other values as they are written."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, Mapping):
        return tuple((key, _of(each)) for key, each in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_of, value))
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value)


def _like(output: Any) -> Any:
    """A new output of the same shape that a backward pass goes through as through the first one."""
    if isinstance(output, torch.Tensor):
        return torch.empty_like(output, requires_grad=output.requires_grad and output.is_floating_point())
    return tuple(map(_like, output)) if isinstance(output, tuple) else output
