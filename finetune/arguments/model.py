"""The flags about the checkpoint, memory and the adapters; those about training are in ``arguments``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which checkpoint is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of the checkpoint, or its hub id (a hub id is downloaded)."}
    )
    llm_type: str | None = field(
        default=None,
        metadata={"help": "Only checked: the family is read from the checkpoint; a wrong value is corrected."},
    )
    template: str | None = field(
        default=None, metadata={"help": "Only checked, as llm_type: LLaMA-Factory's name for a prompt format."}
    )
    print_param_status: bool = field(
        default=False, metadata={"help": "List every parameter with its shape, type and whether it is trained."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), flash_attention_2 or eager, for vision tower and LLM."}
    )
    use_hub_kernels: bool = field(
        default=False,
        metadata={
            "help": "4.6, 4.7: the kernels of linear attention from transformers' mapping on the hub, in place of "
            "installed ones (pip install -e '.[hub-kernels]', a GPU). Downloads and runs code, so it is off by default."
        },
    )
    downsample_mode: str | None = field(
        default=None,
        metadata={
            "help": "4.6 and later: 16x or 4x, how many vision patches become a token; 4x sees finer detail and takes "
            "about four times the tokens per image. Default: DOWNSAMPLE_MODE in the environment, else the adapter's or "
            "the checkpoint's."
        },
    )
    check_base_loss: str = field(
        default="auto",
        metadata={
            "help": "auto stops at step 0 when a pretrained checkpoint has a loss near ln(vocabulary); off does not.",
            "choices": ["auto", "off"],
        },
    )


@dataclass
class MemoryArguments:
    """What saves memory inside a step; part of the training flags."""

    checkpoint_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "With gradient_checkpointing, the parts whose layers are run again. Default: all that keep "
            "anything; a frozen tower keeps nothing. fit: as few as the plan for the GPU's memory allows, if any.",
            "choices": ["llm", "vision", "audio", "fit"],
        },
    )
    vision_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most visual items (thumbnails, slices, frames) encoded at once, and clips of sound unless ZeRO-3. "
            "Default: all of a micro-batch. Saves memory where the tower is frozen or its layers are run again."
        },
    )


def check_memory(training: Any) -> None:
    """Refuses what would be without effect, or reach other networks.

    Raises:
        ArgumentError: --use_liger_kernel, or parts beside "fit".
    """
    if "fit" in (parts := training.checkpoint_parts or []) and len(parts) > 1:
        raise ArgumentError(f"--checkpoint_parts {' '.join(parts)}: fit chooses the parts itself; leave the others out")
    if training.use_liger_kernel:
        raise ArgumentError(
            "--use_liger_kernel true: liger-kernel replaces functions of transformers for every network of the process "
            "and knows none of these; what it saves at the loss is saved here without it (the output layer makes a few "
            "logits at a time)"
        )


@dataclass
class LoraArguments:
    """How LoRA adapters are made; only read with --use_lora."""

    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale; the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter input."})
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression over module names, or all-linear: every linear layer of lora_parts. Default: "
            "the attention projections of lora_parts, by names that the checkpoint's generation has."
        },
    )
    lora_target_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated ends of parameter names that get adapters too, for weights that are in no linear "
            "layer: mlp.experts.gate_up_proj,mlp.experts.down_proj of a mixture. Wants lora_dropout 0. Default: none."
        },
    )
    lora_bias: str = field(
        default="none", metadata={"help": "Biases to train.", "choices": ["none", "all", "lora_only"]}
    )
    lora_modules_to_save: str | None = field(
        default=None, metadata={"help": "Comma-separated modules trained in full and saved too, e.g. embed_tokens."}
    )
    lora_weight_path: str | None = field(
        default=None, metadata={"help": "Adapter folder to start from; its rank, targets and saved modules count."}
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Only these layers of the LLM get adapters, e.g. 0 1 2."}
    )
    lora_layers_pattern: str | None = field(
        default=None, metadata={"help": "Name of the layer list that lora_layers_to_transform counts in (layers)."}
    )
    lora_layer_replication: str | None = field(
        default=None, metadata={"help": 'Ranges of layers to stack, as JSON: "[[0, 16], [8, 24]]".'}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA: scale alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    q_lora: bool = field(
        default=False,
        metadata={"help": "QLoRA: the LLM's linear layers are quantised to 4 bit (nf4, bitsandbytes) on loading."},
    )


def check_lora(lora: LoraArguments, *, use_lora: bool) -> None:
    """Refuses adapters on parameters that would be without effect or that peft does not make; warns of other flags.

    Raises:
        ArgumentError: --lora_target_parameters without LoRA, or with dropout, DoRA or repeated layers.
    """
    if not use_lora:
        if lora.lora_target_parameters is not None:
            raise ArgumentError(
                f"--lora_target_parameters {lora.lora_target_parameters} puts adapters on parameters: it needs "
                "--use_lora true"
            )
        given = [f"--{entry.name}" for entry in fields(lora) if getattr(lora, entry.name) != entry.default]
        if given:
            logger.warning("%s: no effect without --use_lora true", ", ".join(given))
    elif lora.lora_target_parameters is not None:
        reasons = {
            f"--lora_dropout {lora.lora_dropout:g}: an adapter on a parameter sees no input that could be dropped; "
            "--lora_dropout 0 does it": lora.lora_dropout,
            "--use_dora true: peft has no DoRA for parameters": lora.use_dora,
            "--lora_layer_replication: repeated layers have other names": lora.lora_layer_replication,
        }
        if reason := next((words for words, clash in reasons.items() if clash), None):
            raise ArgumentError(f"--lora_target_parameters does not go with {reason}")
