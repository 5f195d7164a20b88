"""Flags of the model, of LoRA and of memory saving, as dataclasses."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The checkpoint and how it is loaded."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of the checkpoint, or its hub id (a hub id is downloaded)."}
    )
    llm_type: str | None = field(
        default=None,
        metadata={
            "help": "Only checked: the model family is detected from the checkpoint; wrong values are corrected."
        },
    )
    template: str | None = field(
        default=None, metadata={"help": "Only checked, as llm_type: LLaMA-Factory's name of a chat template."}
    )
    print_param_status: bool = field(
        default=False, metadata={"help": "Log every parameter with its shape, dtype and whether it is trained."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), flash_attention_2 or eager, for vision tower and LLM."}
    )
    use_hub_kernels: bool = field(
        default=False,
        metadata={
            "help": "4.6, 4.7: linear attention kernels of transformers' hub mapping instead of installed ones "
            "(needs pip install -e '.[hub-kernels]' and a GPU). Downloads and runs code, so it is off by default."
        },
    )
    downsample_mode: str | None = field(
        default=None,
        metadata={
            "help": "4.6 and later: vision patches per token, 16x or 4x; 4x keeps finer detail and needs about four "
            "times as many tokens per image. Default: environment variable DOWNSAMPLE_MODE, else the adapter's or the "
            "checkpoint's value."
        },
    )
    use_image_id: bool | None = field(
        default=None,
        metadata={
            "help": "2.6 and later: whether <image_id>0</image_id> precedes an image in the prompt; false trains the "
            "prompt that llama.cpp writes. Default: the adapter's or the checkpoint's value."
        },
    )
    duplex_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of full-duplex records: native, that of the published inference, or o45_fc, that of "
            "minicpm-o5-sdk with 24 new tokens (docs/duplex.md). Default: the checkpoint's, else native."
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
    """Flags that reduce the memory of a training step; part of the training flags."""

    checkpoint_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "With gradient_checkpointing, the parts whose layers are recomputed. Default: all, and the "
            "resampler; a frozen tower stores no activations. fit: as few parts as the memory estimate for the GPU "
            "allows, possibly none.",
            "choices": ["llm", "vision", "audio", "fit"],
        },
    )
    vision_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of visual items (thumbnails, slices, frames) encoded at once, and of audio clips "
            "without ZeRO-3. Default: all of a micro-batch. Saves memory if the tower is frozen or recomputed."
        },
    )


def check_memory(training: Any) -> None:
    """Refuses flags without effect, and flags that would change other models of the process.

    Raises:
        ArgumentError: --use_liger_kernel, or parts together with "fit".
    """
    if "fit" in (parts := training.checkpoint_parts or []) and len(parts) > 1:
        raise ArgumentError(f"--checkpoint_parts {' '.join(parts)}: fit chooses the parts itself; remove the others")
    if training.use_liger_kernel:
        raise ArgumentError(
            "--use_liger_kernel true: liger-kernel patches transformers for every model of the process and supports "
            "none of these models; the memory that it saves in the loss is saved here without it (chunked logits)"
        )


@dataclass
class LoraArguments:
    """LoRA settings; only used with --use_lora."""

    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale; the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter input."})
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for module names, or all-linear: every linear layer of lora_parts. Default: "
            "the attention projections of lora_parts, by their names in the model family."
        },
    )
    lora_target_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated suffixes of parameter names that get adapters too, for weights that are not in "
            "linear layers: mlp.experts.gate_up_proj,mlp.experts.down_proj of a mixture of experts. Needs lora_dropout "
            "0. Default: none."
        },
    )
    lora_bias: str = field(
        default="none", metadata={"help": "Biases to train.", "choices": ["none", "all", "lora_only"]}
    )
    lora_modules_to_save: str | None = field(
        default=None, metadata={"help": "Comma-separated modules trained in full and saved too, e.g. embed_tokens."}
    )
    lora_weight_path: str | None = field(
        default=None,
        metadata={"help": "Adapter folder to continue training from; its rank, targets and saved modules are used."},
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Only these layers of the LLM get adapters, e.g. 0 1 2."}
    )
    lora_layers_pattern: str | None = field(
        default=None, metadata={"help": "Name of the layer list for lora_layers_to_transform (layers)."}
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
    """Refuses adapters on parameters without effect or without support in peft; warns of other flags without effect.

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
            f"--lora_dropout {lora.lora_dropout:g}: an adapter on a parameter has no input for dropout; "
            "use --lora_dropout 0": lora.lora_dropout,
            "--use_dora true: peft has no DoRA for parameters": lora.use_dora,
            "--lora_layer_replication: repeated layers have other names": lora.lora_layer_replication,
        }
        if reason := next((text for text, conflict in reasons.items() if conflict), None):
            raise ArgumentError(f"--lora_target_parameters cannot be combined with {reason}")
