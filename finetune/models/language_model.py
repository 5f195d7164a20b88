"""Builds the language models: transformers classes, configured from the flat keys of the official config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.packed_attention import implementation_of

CausalLM = GraniteForCausalLM | LlamaForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM

_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)


def _keys(config: MiniCPMVConfig) -> dict[str, Any]:
    """The official keys that are set, without nulls, which transformers would take for values."""
    return {key: value for key in _KEYS if (value := config.read(key)) is not None}


def _prepared(part: PretrainedConfig, config: MiniCPMVConfig) -> Any:
    # not inherited by configurations made here
    part._attn_implementation = implementation_of(config._attn_implementation)
    return part


def _llama(config: MiniCPMVConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(_prepared(LlamaConfig(**_keys(config)), config))


def _qwen2(config: MiniCPMVConfig) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(_prepared(Qwen2Config(**_keys(config)), config))


def _qwen3(config: MiniCPMVConfig) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(_prepared(Qwen3Config(**_keys(config)), config))


def _minicpm(config: MiniCPMVConfig) -> GraniteForCausalLM:
    """MiniCPM-2.4B: Granite computes its scaled residuals and logits.

    Granite's own embedding factor stays 1: it would scale the image features as well.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    part = GraniteConfig(
        **_keys(config),
        embedding_multiplier=1.0,
        attention_multiplier=head_dim**-0.5,
        residual_multiplier=config.scale_depth / config.num_hidden_layers**0.5,
        logits_scaling=config.hidden_size / config.dim_model_base,
    )
    return GraniteForCausalLM(_prepared(part, config))


LANGUAGES: dict[str, Callable[[MiniCPMVConfig], CausalLM]] = {
    "llama": _llama,
    "minicpm": _minicpm,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def embedding_scale(config: MiniCPMVConfig) -> float:
    """Factor on the text embeddings, which image features do not get; 1 unless config.json has one."""
    return float(config.read("scale_emb", 1))


def logits_scaling(llm: CausalLM) -> float:
    """What the model's own forward divides its logits by."""
    return getattr(llm.config, "logits_scaling", 1.0)
