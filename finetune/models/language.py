"""The language models: stock transformers classes fed from the flat official keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.models.configuration import MiniCPMVConfig

CausalLM = GraniteForCausalLM | LlamaForCausalLM

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
)


@dataclass(frozen=True, slots=True)
class Language:
    """One kind of language model.

    Attributes:
        build: makes it, with random weights.
        embedding_scale: factor on the text embeddings, which the image features do not get.
    """

    build: Callable[[MiniCPMVConfig], CausalLM]
    embedding_scale: Callable[[MiniCPMVConfig], float]


def _keys(config: MiniCPMVConfig) -> dict[str, Any]:
    """The official keys that are set; a null would be taken for a value and warned about."""
    return {key: value for key in _KEYS if (value := config.read(key)) is not None}


def _prepared(part: LlamaConfig | GraniteConfig, config: MiniCPMVConfig) -> Any:
    part._attn_implementation = config._attn_implementation  # not handed down to configurations made here
    return part


def _llama(config: MiniCPMVConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(_prepared(LlamaConfig(**_keys(config)), config))


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


LANGUAGES: dict[str, Language] = {
    "llama": Language(build=_llama, embedding_scale=lambda config: 1.0),
    "minicpm": Language(build=_minicpm, embedding_scale=lambda config: float(config.scale_emb)),
}


def logits_of(llm: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of chosen hidden states, (..., E) to (..., V), with the scaling that the model's own forward applies."""
    return llm.lm_head(hidden) / getattr(llm.config, "logits_scaling", 1.0)
