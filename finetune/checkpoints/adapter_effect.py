"""Finds adapters that change nothing: zero weights, or changes that rounding removes."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from finetune.families import detect
from finetune.models.adapters import base_model_of
from finetune.training.freezing import part_of


def no_effect(model: nn.Module, difference: float | None) -> str | None:
    """Why the active adapter of a model changes nothing.

    Args:
        model: the model with its adapter.
        difference: largest absolute change of a logit by the adapter on some input; None if it was not measured.

    Returns:
        The reason; None if the adapter changes something, if only parts are adapted that the input may not use, and
        for a model without an adapter.
    """
    if not isinstance(model, PeftModel):
        return None
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    configs: list[Any] = [*model.peft_config.values()]
    if all(config.bias == "none" for config in configs) and not any(map(_changes, adapted.values())):
        return "its weights are zero or those of the base"
    parts = detect(base_model_of(model).config.to_dict()).parts
    if difference == 0 and any(part_of(name, parts) == "llm" for name in adapted):
        return "its weights are so small that not one logit differs from the base's"
    return None


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))


def _changes(module: Any) -> bool:
    """Whether the weights of an adapted module give another result than the base's."""
    if isinstance(module, ModulesToSaveWrapper):
        base = module.original_module.state_dict()
        return any(
            not torch.equal(value.to(base[key]), base[key])  # peft may load 16 bit weights in float32
            for name in module.active_adapters
            for key, value in module.modules_to_save[name].state_dict().items()
        )
    if not isinstance(module, LoraLayer) or len(module.lora_magnitude_vector):
        return True  # single tokens and DoRA: not compared
    pairs = [(module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B)]
    return any(
        _nonzero(a[name]) and _nonzero(b[name]) for a, b in pairs for name in module.active_adapters if name in b
    )


def _nonzero(side: Any) -> bool:
    """Whether a matrix of an adapter, or its bias, has a value other than zero."""
    tensors = [side] if isinstance(side, torch.Tensor) else list(side.parameters())
    return any(bool(tensor.detach().any()) for tensor in tensors)
