"""Models with weights in 4 bit by bitsandbytes: their layers are checked, the other weights get one dtype."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from finetune.utils.errors import CheckpointError

# Outputs that bitsandbytes repacks together.
_REPACKED = 32


def check_bitsandbytes(name: str) -> None:
    """Refuses a checkpoint in 4 bit where bitsandbytes is not installed.

    Raises:
        CheckpointError: naming the checkpoint and what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(f"{name} is stored in 4 bit, which needs bitsandbytes: pip install -e '.[quant]'")


def check_layers(model: nn.Module, name: str, packed: set[str]) -> None:
    """Checks that the model's layers in 4 bit are those of the files.

    Args:
        model: the loaded model.
        name: the checkpoint, for the message.
        packed: names of the weights that the files have in 4 bit.

    Raises:
        CheckpointError: naming a layer that is in 4 bit only in the files, or only in the model.
    """
    here = {f"{path}.weight" for path, _ in _layers(model)}
    if wrong := sorted(here ^ packed):
        said = ("in 4 bit", "whole") if wrong[0] in packed else ("whole", "in 4 bit")
        raise CheckpointError(
            f"{name}: {wrong[0]} is {said[0]} in the weight files, but {said[1]} by quantization_config in config.json "
            "(llm_int8_skip_modules names the layers that are whole): the files are of different checkpoints"
        )


def prepare_4bit(model: nn.Module, dtype: torch.dtype | str) -> None:
    """Brings all weights but those in 4 bit and LoRA to one type; layers in 4 bit compute in it, on every CPU.

    transformers gives every ``weight`` of a checkpoint in 4 bit the type of the file, and only the rest the one asked
    for (``findings/transformers_4bit_folder_dtype.sh``); layers in 4 bit compute in the type of config.json, float16 in
    the published ones. For CPUs with AVX-512 BF16 bitsandbytes repacks weights in evaluation, and raises where the
    number of outputs is no multiple of 32, as in the decay and gate layers of linear attention: those are left alone.

    Args:
        model: the loaded model, without or with adapters.
        dtype: as for ``from_pretrained``; "auto" is the type of config.json, and leaves the computation as it is there.
    """
    settings: Any = model.config
    kind = settings.dtype if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != kind and ".lora_" not in name:
            parameter.data = parameter.data.to(kind)
    for _, layer in _layers(model):
        if layer.out_features % _REPACKED:
            layer.support_avx512bf16_for_cpu = False
        if dtype != "auto":
            layer.compute_dtype = kind


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from bitsandbytes.nn.modules import Linear4bit

    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Linear4bit)]
