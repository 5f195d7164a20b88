"""Freezing and LoRA per part of the model, the table of trainable parameters, fp32 master weights.

``from_pretrained`` makes every parameter trainable, so freezing has to follow it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import set_seed

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families.family import Family
from finetune.models.adapter_biases import is_base_bias
from finetune.models.experts import routed_shares
from finetune.training.lora import add_lora
from finetune.utils.errors import ArgumentError
from finetune.utils.number_format import significant

logger = logging.getLogger(__name__)

# Part of the model -> the modules it consists of (Family.parts).
Parts = Mapping[str, tuple[str, ...]]
# Layers whose kernels do not cast input and weights to one type under autocast.
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def part_of(name: str, parts: Parts) -> str:
    """The part a parameter belongs to, by its name with or without peft's prefixes.

    Raises:
        ValueError: the name belongs to none of the parts.
    """
    inside = name.removeprefix("module.").removeprefix("base_model.model.")
    for part, modules in parts.items():
        if any(inside == module or inside.startswith(f"{module}.") for module in modules):
            return part
    raise ValueError(f"parameter {name!r} belongs to none of the parts {', '.join(parts)}")


def adapt(model: nn.Module, family: Family, training: TrainingArguments, lora: LoraArguments) -> nn.Module:
    """Freezes what is not trained and, with LoRA, wraps the model with adapters.

    Trainable 16-bit weights, and those of norms, become fp32 (they run under autocast), unless DeepSpeed keeps fp32
    master weights itself.

    Raises:
        ArgumentError: a part that the model does not have, or LoRA targets that match none of its modules.
    """
    _set_memory_saving(model, family, training)
    _warn_of_router_losses(model, family)
    model.requires_grad_(False)
    # Loading draws random numbers, with ZeRO-3 a different count; adapters must be initialised alike in every mode.
    set_seed(training.seed)
    full = full_parts(training)
    if unknown := [part for part in full if part not in family.parts]:
        raise ArgumentError(f"--tune_{unknown[0]} true: {family.title} has no {unknown[0]} part")
    modules = [module for part in full for module in family.parts[part]]
    deepspeed_master_weights = bool(training.deepspeed and (training.bf16 or training.fp16))
    if training.use_lora:
        model = add_lora(model, family, modules, lora, training.lora_parts, in_fp32=not deepspeed_master_weights)
        _warn_of_biases(model, family, training)
    else:
        for module in modules:
            model.get_submodule(module).requires_grad_(True)
        if training.tune_llm_layers is not None:
            _freeze_other_layers(model, family, training.tune_llm_layers)
        # Not with LoRA: peft trains all of a saved module, as in the published counts (Trainable 733677856).
        for name, parameter in model.named_parameters():
            if name in family.fixed_parameters:
                parameter.requires_grad_(False)
    if not deepspeed_master_weights:
        _cast_to_fp32(model)
    return model


def _warn_of_biases(model: nn.Module, family: Family, training: TrainingArguments) -> None:
    """Names the parts of which only ``--lora_bias all`` trains anything."""
    chosen = {*full_parts(training), *training.lora_parts}
    trained = {part_of(name, family.parts) for name, value in model.named_parameters() if value.requires_grad}
    if only := sorted(trained - chosen):
        logger.warning(
            "--lora_bias all also trains the biases of parts that are frozen otherwise: %s. --lora_bias lora_only "
            "trains those of layers with LoRA",
            ", ".join(only),
        )


def _cast_to_fp32(model: nn.Module) -> None:
    """Casts trained 16-bit weights, and the weights of all norms, to fp32.

    Norms too, because a frozen norm may get fp32 input from a trained part before it, or have one trained and one
    frozen weight. Autocast casts the inputs of matrix products but not of norms, whose CPU kernels take fp32 input with
    fp32 weights only.
    """
    norms = {id(weight) for module in model.modules() if isinstance(module, _NORMS) for weight in module.parameters()}
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and (parameter.requires_grad or id(parameter) in norms):
            parameter.data = parameter.data.float()


def _warn_of_router_losses(model: Any, family: Family) -> None:
    text = getattr(model.config, "text_config", None)
    if getattr(text, "output_router_logits", False):
        logger.warning(
            "output_router_logits in config.json has no effect: the published class of %s adds no router loss",
            family.title,
        )


def _set_memory_saving(model: Any, family: Family, training: TrainingArguments) -> None:
    """Sets the parts with gradient checkpointing, and how many visual items the model encodes at once.

    Raises:
        ArgumentError: a part that the model does not have, or a number below 1.
    """
    if unknown := [part for part in training.checkpoint_parts or () if part not in family.parts]:
        raise ArgumentError(f"--checkpoint_parts {unknown[0]}: {family.title} has no {unknown[0]} part")
    if training.vision_batch is not None and training.vision_batch < 1:
        raise ArgumentError(f"--vision_batch {training.vision_batch}: at least 1 visual item is needed")
    if training.checkpoint_parts and not training.gradient_checkpointing:
        logger.warning("--checkpoint_parts has no effect without --gradient_checkpointing true")
    model.checkpoint_parts, model.vision_batch = training.checkpoint_parts, training.vision_batch


def _freeze_other_layers(model: nn.Module, family: Family, count: int) -> None:
    """Freezes the LLM but for its last ``count`` layers (a negative count: its first).

    Raises:
        ArgumentError: the LLM has fewer layers.
    """
    inside = tuple(f"{module}." for module in family.parts["llm"])
    named = model.named_modules()
    layers = next(m for name, m in named if name.startswith(inside) and name.endswith(".layers"))
    assert isinstance(layers, nn.ModuleList)
    if abs(count) > len(layers):
        raise ArgumentError(f"--tune_llm_layers {count}: the LLM of {family.title} has {len(layers)} layers")
    for module in family.parts["llm"]:
        model.get_submodule(module).requires_grad_(False)
    for layer in layers[-count:] if count > 0 else layers[:-count]:
        layer.requires_grad_(True)


def full_parts(training: TrainingArguments) -> list[str]:
    """The parts trained in full."""
    chosen = {
        "vision": training.tune_vision,
        "resampler": training.tune_resampler,
        "llm": training.tune_llm,
        "audio": training.tune_audio,
    }
    return [part for part, tuned in chosen.items() if tuned]


@dataclass(frozen=True, slots=True)
class PartRow:
    """One row of the table of trainable parameters.

    Attributes:
        part: "vision", "resampler", "llm" or "audio".
        mode: "frozen", "full", "biases", "LoRA r=...", "QLoRA r=..." (on 4 bit) or a mix such as "LoRA r=64 +
            embed_tokens + biases".
        total: parameters, copies of saved modules counted once.
        active: parameters used per token; fewer than ``total`` in a mixture of experts.
        trainable: parameters that train.
        learning_rate: of the part; None when frozen.
    """

    part: str
    mode: str
    total: int
    active: int
    trainable: int
    learning_rate: float | None


def numel(parameter: nn.Parameter) -> int:
    """Number of elements, also of a parameter partitioned by ZeRO-3 (its local size is 0) or quantised to 4 bit."""
    packed = 2 if getattr(parameter, "quant_state", None) is not None else 1
    return getattr(parameter, "ds_numel", parameter.numel()) * packed


def counted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters without the frozen originals that peft keeps beside the trained copies."""
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            yield name, parameter


def part_rows(model: nn.Module, parts: Parts, learning_rates: Mapping[str, float]) -> list[PartRow]:
    """The table of trainable parameters per part, from ``requires_grad`` of the model and not from the flags."""
    rows, routed = [], routed_shares(model)
    for part in parts:
        parameters = [(name, p) for name, p in counted(model) if part_of(name, parts) == part]
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        mode = _mode(model, [name for name, _ in trained])
        if mode.startswith("LoRA") and any(id(p) in routed for _, p in parameters):
            # Fused experts are parameters, not linear layers: default LoRA targets do not include them.
            mode += " + experts" if any(id(p) in routed for _, p in trained) else ", experts frozen"
        if mode.startswith("LoRA") and any(getattr(p, "quant_state", None) is not None for _, p in parameters):
            mode = f"Q{mode}"
        rate = learning_rates[part] if trained else None
        active = sum(int(numel(p) * routed.get(id(p), 1)) for _, p in parameters)
        rows.append(PartRow(part, mode, _sum(parameters), active, _sum(trained), rate))
    return rows


def describe_parameters(model: nn.Module) -> str:
    """Every parameter with its shape, dtype and whether it is trained, one per line."""
    return "\n".join(
        f"{name}: {tuple(parameter.shape)}, {str(parameter.dtype).removeprefix('torch.')}, "
        f"{'trained' if parameter.requires_grad else 'frozen'}"
        for name, parameter in model.named_parameters()
    )


def _sum(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    return sum(numel(parameter) for _, parameter in parameters)


def _mode(model: nn.Module, trained: list[str]) -> str:
    if not trained:
        return "frozen"
    adapters = [name for name in trained if ".lora_" in name]
    biases = [name for name in trained if is_base_bias(name)] if isinstance(model, PeftModel) else []
    if not adapters:
        return "biases" if len(biases) == len(trained) else "full"
    assert isinstance(model, PeftModel)
    config = model.peft_config[model.active_adapter]  # pyright: ignore[reportArgumentType]
    saved = {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in trained if ".modules_to_save." in name}
    rows = len(next(iter((getattr(config, "trainable_token_indices", None) or {}).values()), ()))
    single = [f"{rows} rows"] if any(".token_adapter." in name for name in trained) else []
    return " + ".join([f"LoRA r={getattr(config, 'r', '?')}", *sorted(saved), *single, *["biases"][: len(biases)]])


def format_table(rows: list[PartRow]) -> str:
    """The table as text, with a total line; for mixtures of experts with a column of active parameters."""
    total, active, trainable = (sum(getattr(row, name) for row in rows) for name in ("total", "active", "trainable"))
    mixture = active != total

    def line(part: str, mode: str, counts: Sequence[str], rate: str) -> str:
        shown = counts if mixture else (counts[0], counts[2])
        return f"{part:<10} {mode:<28} {' '.join(f'{count:>15}' for count in shown)} {rate:>10}"

    lines = [line("part", "mode", ("parameters", "active", "trainable"), "lr")]
    for row in rows:
        rate = "-" if row.learning_rate is None else significant(row.learning_rate)
        lines.append(line(row.part, row.mode, (f"{row.total:,}", f"{row.active:,}", f"{row.trainable:,}"), rate))
    share = f"{100 * trainable / max(total, 1):.2f} % trained"
    lines.append(line("all", share, (f"{total:,}", f"{active:,}", f"{trainable:,}"), ""))
    return "\n".join(lines) + ("\nactive: parameters used per token, without the experts it is not routed to" * mixture)
