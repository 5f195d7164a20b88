"""Builds the model of a checkpoint on the meta device, frozen and wrapped with adapters as in training."""

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
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import detect
from finetune.model_folders.stored_4bit import quantisation_of, stored_in_4bit
from finetune.models.adapters import ADAPTER_PREFIX, base_model_name
from finetune.models.loading import MODEL_CLASSES
from finetune.planning.training_setup import TrainingSetup
from finetune.training.freezing import adapt

# The LLM's linear layers that QLoRA does not quantise, as in training.lora.
_OUTPUT = "lm_head"
_NOT_QUANTISED = (_OUTPUT, "in_proj_a", "in_proj_b")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings about a training that does not take place (no GPU found, ...)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def build_meta_model(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a config.json on the meta device, without freezing or adapters.

    Args:
        config: config.json as a dictionary.
        dtype: of the weights.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    detect(config)
    model_class = MODEL_CLASSES[config["model_type"]]
    settings: Any = model_class.config_class
    settings = settings(**config)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = model_class(settings)
    return model.to(dtype)


def prepare_meta_model(config: dict[str, Any], setup: TrainingSetup, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model on the meta device, frozen and wrapped with adapters by the code of training.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
        ArgumentError: flags that contradict each other or the family.
    """
    with quiet():
        training = TrainingArguments(output_dir=gettempdir(), use_cpu=True, report_to="none", **setup.training_flags())
        return adapt_meta_model(config, training, LoraArguments(lora_r=setup.lora_r), setup, dtype)


def adapt_meta_model(
    config: dict[str, Any], training: TrainingArguments, lora: LoraArguments, setup: TrainingSetup, dtype: torch.dtype
) -> nn.Module:
    """The model on the meta device as these flags train it; of the setup only the ZeRO stage is used.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
        ArgumentError: flags that contradict each other or the family.
    """
    model = build_meta_model(config, dtype)
    # 4 bit is only counted; an adapter whose training is continued is assumed to match the flags.
    training, lora = copy.copy(training), replace(lora, q_lora=False, lora_weight_path=None)
    training.deepspeed, training.checkpoint_parts = None, None
    if setup.stage:  # a minimal configuration: DeepSpeed is not started
        training.deepspeed, training.bf16 = {"zero_optimization": {"stage": setup.stage}}, dtype != torch.float32
    with torch.device("meta"):
        model = adapt(model, detect(config), training, lora)
    if setup.master_weights:
        model.to(dtype)  # with real weights, peft casts adapters to the dtype of their base layers
    model.train()
    return model


def quantised(model: nn.Module, config: dict[str, Any]) -> set[str]:
    """Names of the weights in 4 bit: those that config.json does not leave whole, or those that QLoRA quantises."""
    names = {
        f"{name}.weight": base_model_name(name.removeprefix(ADAPTER_PREFIX))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    if stored_in_4bit(config):
        whole = quantisation_of(config).get("llm_int8_skip_modules") or [_OUTPUT]
        return {name for name, own in names.items() if should_convert_module(own, whole)}
    inside = tuple(f"{module}." for module in detect(config).parts["llm"])
    return {
        name for name, own in names.items() if own.startswith(inside) and own.rpartition(".")[2] not in _NOT_QUANTISED
    }
