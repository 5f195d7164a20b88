"""Configurations of the published checkpoints, as far as they decide the sizes of models and prompts.

Read from the published files of 2.0, 2.5, 2.6, 4.5 and o-4.5; ASSUMED lists families with values from other sources.
Used only when no checkpoint folder is given.
"""

from __future__ import annotations

from typing import Any

from finetune.families.settings import PROCESSORS

# Families with values that were not read from their own config.json.
ASSUMED = ("o2_6", "v4_0", "v4_6", "v4_7", "ocr1_0")

_SLICES = {"max_slice_nums": 9, "patch_size": 14}
_SIGLIP = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
_NAVIT = {
    "architectures": ["MiniCPMV"],
    "model_type": "minicpmv",
    "drop_vision_last_layer": False,
    "image_size": 448,
    "patch_size": 14,
    "query_num": 64,
    "slice_config": _SLICES,
    "slice_mode": True,
    "tie_word_embeddings": False,
    "vision_config": {**_SIGLIP, "model_type": "siglip"},
}
_WHISPER_MEDIUM = {
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layers": 24,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "model_type": "whisper",
}
_OMNI = {"architectures": ["MiniCPMO"], "model_type": "minicpmo", "audio_config": _WHISPER_MEDIUM}
_QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
_QWEN3_8B = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151748,
}
_QWEN3_5 = {
    "attention_bias": False,
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_5_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "vocab_size": 248320,
}


def _native(maker: str, model_type: str, mode: str = "16x") -> dict[str, Any]:
    return {
        "architectures": [f"{maker}ForConditionalGeneration"],
        "downsample_mode": mode,
        "insert_layer_id": 6,
        "merge_kernel_size": [2, 2],
        "merger_times": 1,
        "model_type": model_type,
        "text_config": _QWEN3_5,
        "tie_word_embeddings": True,
        "vision_config": {
            **_SIGLIP,
            "hidden_act": "gelu_pytorch_tanh",
            "model_type": f"{model_type}_vision",
            "num_channels": 3,
            "window_kernel_size": [2, 2],
        },
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "v2_0": {
        "architectures": ["MiniCPMV"],
        "attention_bias": False,
        "dim_model_base": 256,
        "drop_vision_last_layer": True,
        "hidden_size": 2304,
        "image_size": 448,
        "intermediate_size": 5760,
        "max_position_embeddings": 4096,
        "max_slice_nums": 9,
        "model_type": "minicpmv",
        "num_attention_heads": 36,
        "num_hidden_layers": 40,
        "num_key_value_heads": 36,
        "patch_size": 14,
        "query_num": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "scale_resolution": 448,
        "slice_mode": True,
        "tie_word_embeddings": False,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        "vocab_size": 122753,
    },
    "llama3_v2_5": {
        **_NAVIT,
        "version": "2.5",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "query_num": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vision_config": {**_SIGLIP, "model_type": "idefics2"},
        "vocab_size": 128256,
    },
    "v2_6": {**_NAVIT, **_QWEN2_7B, "version": 2.6, "vocab_size": 151666},
    "o2_6": {**_NAVIT, **_QWEN2_7B, **_OMNI, "version": 2.6, "audio_pool_step": 2, "vocab_size": 151700},
    "v4_0": {
        **_NAVIT,
        "version": 4.0,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 73448,
    },
    "v4_5": {**_NAVIT, **_QWEN3_8B, "version": 4.5, "batch_3d_resampler": True},
    "o4_5": {
        **_NAVIT,
        **_QWEN3_8B,
        **_OMNI,
        "version": "4.5",
        "audio_chunk_length": 1.0,
        "audio_pool_step": 5,
        "slice_config": {"max_slice_nums": 1, "patch_size": 14, "scale_resolution": 448},
        "stream_input": True,
    },
    "v4_6": {**_native("MiniCPMV4_6", "minicpmv4_6"), "image_size": 448},
    "v4_7": {**_native("MiniCPMV4_7", "minicpmv4_7"), "image_size": 448},
    "ocr1_0": _native("MiniCPMOcr", "minicpm_ocr", "4x"),
}
_PIXELS = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "norm_mean": [0.5] * 3,
    "norm_std": [0.5] * 3,
}
_NUMBERED = {**_PIXELS, "image_feature_size": 64, "slice_mode": True, "use_image_id": True}
# preprocessor_config.json; 2.0 is published without one, and what 4.6 and 4.7 have is the default of their classes.
_PREPROCESSORS: dict[str, dict[str, Any]] = {
    "llama3_v2_5": {**_PIXELS, "image_feature_size": 96},
    **dict.fromkeys(("v2_6", "o2_6", "v4_0", "v4_5"), _NUMBERED),
    "o4_5": {**_NUMBERED, "audio_pool_step": 5},
}


def settings(family: str) -> dict[str, Any]:
    """``Checkpoint.settings`` of a published folder, as far as they decide the size of prompts."""
    processor = _PREPROCESSORS.get(family)
    return CONFIGS[family] if processor is None else {**CONFIGS[family], **dict.fromkeys(PROCESSORS, processor)}
