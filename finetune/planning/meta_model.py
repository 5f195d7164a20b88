"""The network of a checkpoint without its weights: every tensor has a shape and a type, and no memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import detect
from finetune.models.loading import MODEL_CLASSES
from finetune.planning.training_setup import TrainingSetup
from finetune.training.freezing import adapt

# The LLM's linear layers that 4 bit leaves alone, as in training.lora.
_WHOLE_LINEAR = ("lm_head", "in_proj_a", "in_proj_b")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of a training that does not take place (no GPU found, ...)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def build(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The network of a config.json on the meta device, nothing frozen and nothing added.

    Args:
        config: config.json as a dictionary.
        dtype: of the weights.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    detect(config)
    network = MODEL_CLASSES[config["model_type"]]
    settings: Any = network.config_class
    settings = settings(**config)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = network(settings)
    return model.to(dtype)


def prepared(config: dict[str, Any], recipe: TrainingSetup, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The same as it is trained: frozen and wrapped with adapters exactly as training does it.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
        ArgumentError: flags that contradict each other or the family.
    """
    with quiet():
        training = TrainingArguments(output_dir=gettempdir(), use_cpu=True, report_to="none", **recipe.training_flags())
        return adapted(config, training, LoraArguments(lora_r=recipe.lora_r), recipe, dtype)


def adapted(
    config: dict[str, Any], training: TrainingArguments, lora: LoraArguments, recipe: TrainingSetup, dtype: torch.dtype
) -> nn.Module:
    """The network as these flags train it; of the recipe the stage of ZeRO counts.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
        ArgumentError: flags that contradict each other or the family.
    """
    model = build(config, dtype)
    # 4 bit is counted, not made; an adapter that is gone on from is taken for one of these flags.
    training, lora = copy.copy(training), replace(lora, q_lora=False, lora_weight_path=None)
    training.deepspeed, training.checkpoint_parts = None, None
    if recipe.stage:  # a stand-in: DeepSpeed is not to be started
        training.deepspeed, training.bf16 = {"zero_optimization": {"stage": recipe.stage}}, dtype != torch.float32
    with torch.device("meta"):
        model = adapt(model, detect(config), training, lora)
    if recipe.masters:
        model.to(dtype)  # with weights, peft gives adapters the type of what they stand on
    model.train()
    return model


def quantised(model: nn.Module, config: dict[str, Any]) -> set[str]:
    """Names of the weights that QLoRA keeps in 4 bit."""
    inside = tuple(f"{module}." for module in detect(config).parts["llm"])
    names = set()
    for name, module in model.named_modules():
        own = name.removeprefix("base_model.model.")
        last = own.removesuffix(".base_layer").rpartition(".")[2]
        if (
            isinstance(module, nn.Linear)
            and own.startswith(inside)
            and last not in _WHOLE_LINEAR
            and ".lora_" not in own
        ):
            names.add(f"{name}.weight")
    return names
