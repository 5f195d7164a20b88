"""``Published``: the configuration files of a published checkpoint; and the values that several families share.

Only values that decide the sizes of models and prompts. Planning without a checkpoint folder uses them, and the tiny
checkpoints have the same files with small sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.families.settings import PROCESSORS


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Configuration of a published checkpoint.

    Attributes:
        config: config.json.
        preprocessor: preprocessor_config.json; empty if there is none, or if it has the defaults of its class.
        processors: prefix of the names of its image and video processor in transformers; empty for remote code.
        assumed: whether some values were not read from its own config.json.
        experts: whether there are also checkpoints whose language model is a mixture of experts.
    """

    config: dict[str, Any]
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    processors: str = ""
    assumed: bool = False
    experts: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """``BaseCheckpoint.settings`` of the published folder."""
        return {**self.config, **dict.fromkeys(PROCESSORS, self.preprocessor)} if self.preprocessor else self.config


_SLICES = {"max_slice_nums": 9, "patch_size": 14}
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
NAVIT = {
    "architectures": ["MiniCPMV"],
    "model_type": "minicpmv",
    "batch_vision_input": True,
    "drop_vision_last_layer": False,
    "image_size": 448,
    "patch_size": 14,
    "query_num": 64,
    "slice_config": _SLICES,
    "slice_mode": True,
    "transformers_version": "4.40.0",
    "use_cache": False,
    "tie_word_embeddings": False,
    "vision_config": {**SIGLIP, "model_type": "siglip"},
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
OMNI = {
    "architectures": ["MiniCPMO"],
    "model_type": "minicpmo",
    "audio_chunk_length": 1.0,
    "audio_config": _WHISPER_MEDIUM,
    "init_audio": True,
    "init_tts": True,
    "init_vision": True,
}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
QWEN3_8B = {
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
    "transformers_version": "4.51.0",
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


def native_config(maker: str, model_type: str, mode: str = "16x") -> dict[str, Any]:
    """config.json of a model whose classes, named ``maker``..., are in transformers."""
    return {
        "architectures": [f"{maker}ForConditionalGeneration"],
        "downsample_mode": mode,
        "insert_layer_id": 6,
        "merge_kernel_size": [2, 2],
        "merger_times": 1,
        "model_type": model_type,
        "text_config": _QWEN3_5,
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "vision_config": {
            **SIGLIP,
            "hidden_act": "gelu_pytorch_tanh",
            "model_type": f"{model_type}_vision",
            "num_channels": 3,
            "window_kernel_size": [2, 2],
        },
    }


PIXELS = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "norm_mean": [0.5] * 3,
    "norm_std": [0.5] * 3,
}
NUMBERED_PIXELS = {**PIXELS, "image_feature_size": 64, "slice_mode": True, "use_image_id": True, "version": 2.6}
