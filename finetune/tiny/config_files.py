"""Configuration files of the tiny checkpoints: config.json, generation_config.json and preprocessor_config.json."""

from __future__ import annotations

from typing import Any

from finetune.families.llama3_v2_5 import LLAMA3_V2_5

# The template of the published inference tokenizer: it always ends with the header of the answer.
LLAMA3_CHAT_TEMPLATE = LLAMA3_V2_5.inference_template
VOCABULARY = {
    "v2_0": 832,
    "llama3_v2_5": 640,
    "v2_6": 640,
    "o2_6": 640,
    "v4_0": 640,
    "v4_5": 640,
    "o4_5": 640,
}
SCALE_RESOLUTION = 112
# Scale factors of random weights, for the demo: text embeddings of the magnitude of image features, and logits
# large enough for a confident prediction with a frozen lm_head. scale_emb and hidden_size /
# dim_model_base do the same in 2.0.
_LOUDER = {"llm.model.embed_tokens.weight": 10.0, "llm.lm_head.weight": 2.0}
LOUDER = {family: {} if family == "v2_0" else _LOUDER for family in VOCABULARY}
# Sizes on which the demo learns within a minute. A frozen random LLM needs the wide initialisation: with the usual
# 0.02 its logits are so flat that training takes four times the steps.
_LANGUAGE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_V2_0 = {
    "bos_token_id": 1,
    "dim_model_base": 256,
    "drop_vision_last_layer": True,
    "eos_token_id": 2,
    "image_size": 448,
    "max_position_embeddings": 4096,
    "max_slice_nums": 9,
    "mm_use_im_start_end": True,
    "num_key_value_heads": 4,
    "patch_size": 14,
    "query_num": 9,
    "rope_theta": 10000.0,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "scale_resolution": SCALE_RESOLUTION,
    "slice_mode": True,
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
    # Not an official key: the official config has no vision sizes. One block is dropped after construction.
    "vision_encoder_kwargs": {"img_size": 112, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
}
_LLAMA3_V2_5 = {
    "version": "2.5",
    "batch_vision_input": True,
    "drop_vision_last_layer": False,
    "image_size": 448,
    "max_position_embeddings": 8192,
    "mm_use_im_start_end": True,
    "num_key_value_heads": 2,
    "patch_size": 14,
    "query_num": 8,
    "rope_theta": 500000.0,
    "slice_config": {
        "max_slice_nums": 9,
        "patch_size": 14,
        "scale_resolution": SCALE_RESOLUTION,
        "model_type": "minicpmv",
    },
    "slice_mode": True,
    "transformers_version": "4.40.0",
    "use_cache": False,
    "vision_config": {
        "hidden_size": 64,
        "image_size": 980,
        "intermediate_size": 128,
        "model_type": "idefics2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 14,
    },
}
_SINCE_2_6 = {
    **_LLAMA3_V2_5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "vision_config": {**_LLAMA3_V2_5["vision_config"], "model_type": "siglip"},
}
_V2_6 = {**_SINCE_2_6, "version": 2.6, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 2}
_V4_5 = {**_SINCE_2_6, "version": 4.5, "head_dim": 32, "batch_3d_resampler": True, "transformers_version": "4.51.0"}
_AUDIO = {
    "audio_chunk_length": 1.0,
    "audio_config": {
        "d_model": 64,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "encoder_layers": 2,
        "model_type": "whisper",
    },
    "init_audio": True,
    "init_tts": True,
    "init_vision": True,
}
_CONFIGS = {
    "v2_0": _V2_0,
    "llama3_v2_5": _LLAMA3_V2_5,
    "v2_6": _V2_6,
    "o2_6": {**_V2_6, **_AUDIO, "audio_pool_step": 2, "chunk_input": True},
    "v4_0": {**_SINCE_2_6, "version": 4.0, "rope_theta": 10000.0, "transformers_version": "4.46.3"},
    "v4_5": _V4_5,
    # Published like this, with 9 slices in preprocessor_config.json.
    "o4_5": {
        **_V4_5,
        **_AUDIO,
        "audio_pool_step": 5,
        "batch_3d_resampler": False,
        "slice_config": {**_SINCE_2_6["slice_config"], "max_slice_nums": 1},
        "stream_input": True,
    },
}


def config(family: str, bos: int, eos: int, dtype: str) -> dict[str, Any]:
    """config.json of a family in the layout of the published one, with tiny sizes."""
    own = _CONFIGS[family]
    letter = "o" if "audio_config" in own else "v"
    name = f"MiniCPM{letter.upper()}"
    modeling = f"modeling_minicpm{letter}.{name}"
    return {
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"configuration_minicpm.{name}Config",
            "AutoModel": modeling,
            "AutoModelForCausalLM": modeling,
        },
        "model_type": f"minicpm{letter}",
        **dict(sorted({**_LANGUAGE, **own}.items())),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "vocab_size": VOCABULARY[family],
    }


def generation_config(bos: int, eos: int, version: str) -> dict[str, Any]:
    """generation_config.json, as published for both generations."""
    return {
        "_from_model_config": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "transformers_version": version,
    }


def preprocessor_config(family: str, query_num: int) -> dict[str, Any]:
    """preprocessor_config.json of a family in the layout of the published one."""
    version = {"v2_0": {}, "llama3_v2_5": {"version": 2.5}, "o4_5": {"version": 4.5}}.get(family, {"version": 2.6})
    if family not in ("v2_0", "llama3_v2_5"):
        version |= {"im_id_start": "<image_id>", "im_id_end": "</image_id>", "slice_mode": True, "use_image_id": True}
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {
            "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
        },
        "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": 9,
        "scale_resolution": SCALE_RESOLUTION,
        "patch_size": 14,
        "image_feature_size": query_num,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        **version,
    }
