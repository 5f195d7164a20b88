"""Configuration files of the tiny checkpoints: those of the published checkpoint with small sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.family import Family
from finetune.families.published import PIXELS

SCALE_RESOLUTION = 112
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
}
_FLAT = {**_LANGUAGE, "mm_use_im_start_end": True, "pretraining_tp": 1, "rope_scaling": None}
_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
_AUDIO = {"d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 256, "encoder_layers": 2}
# Language models of transformers' classes: one layer with linear attention, one with full attention.
_TEXT = {
    **_LANGUAGE,
    "full_attention_interval": 2,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 2,
}
# Sizes that a published config.json has only in some generations.
_OPTIONAL = {"head_dim": 32, "max_window_layers": 2, "scale_resolution": SCALE_RESOLUTION}
# Not official keys: the config.json of 2.0 has no vision sizes. One block is dropped after construction.
_TIMM = {"img_size": 112, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}


def vocabulary(family: Family) -> int:
    """Rows of the embedding table; that of 2.0 has room for the words of the demo."""
    return 832 if family.llm_type == "minicpm" else 640


def louder(family: Family) -> dict[str, float]:
    """Scale factors of random weights, for the demo, by name.

    Text embeddings get the magnitude of image features, and logits are large enough for a confident prediction with a
    frozen lm_head. ``scale_emb`` and ``dim_model_base`` of config.json do the same in 2.0.
    """
    if family.network is None or "scale_emb" in family.published.config:
        return {}
    return {"llm.model.embed_tokens.weight": 10.0, "llm.lm_head.weight": 2.0}


def config(family: Family, bos: int, eos: int, dtype: str) -> dict[str, Any]:
    """config.json of a family with a network of this package."""
    published = family.published.config
    name = published["architectures"][0]
    modeling = f"modeling_{name.lower()}.{name}"
    # The queries of 2.0 are a square.
    queries = 9 if family.network and family.network.resampler == "query_positions" else 8
    own = {**published, **_FLAT, "query_num": queries, **{key: _OPTIONAL[key] for key in _OPTIONAL if key in published}}
    own["num_key_value_heads"] = 4 if published["num_key_value_heads"] == published["num_attention_heads"] else 2
    own |= {key: {**published[key], **sizes} for key, sizes in _PARTS.items() if key in published}
    if "vision_encoder" in published:
        own["vision_encoder_kwargs"] = _TIMM
    return {
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"configuration_minicpm.{name}Config",
            "AutoModel": modeling,
            "AutoModelForCausalLM": modeling,
        },
        "model_type": published["model_type"],
        **dict(sorted(own.items())),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "vocab_size": vocabulary(family),
    }


_PARTS = {"vision_config": _VISION, "audio_config": _AUDIO, "slice_config": {"scale_resolution": SCALE_RESOLUTION}}


def native_config(family: Family, ids: Mapping[str, int], experts: int = 0) -> dict[str, Any]:
    """config.json of a family whose model class is in transformers.

    Args:
        family: model family.
        ids: ids of the tokenizer by token.
        experts: routed experts of the language model; 0 for a dense one.
    """
    published = family.published.config
    text = {**published["text_config"], **_TEXT, "bos_token_id": None, "dtype": "float32", "use_cache": True}
    text |= {"eos_token_id": ids["<|endoftext|>"], "vocab_size": vocabulary(family)}
    # Rotary embedding on a quarter of the head: four frequencies, divided among time, height and width.
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 1, 1]}
    text = _mixture(text, experts) if experts else text
    marks = {
        "image_start_id": ids["<image>"],
        "image_end_id": ids["</image>"],
        "slice_start_id": ids["<slice>"],
        "slice_end_id": ids["</slice>"],
        "newline_id": ids["Ċ"],
    }
    return {
        **published,
        "image_token_id": ids["<|image_pad|>"],
        "insert_layer_id": 0,
        # Positions on the canvas follow from these tokens.
        **(marks if family.inputs == "canvas" else {}),
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {**published["vision_config"], **_VISION, "attention_dropout": 0.0, "layer_norm_eps": 1e-06},
    }


def _mixture(dense: dict[str, Any], experts: int) -> dict[str, Any]:
    """The language model with experts in place of its MLPs, as Qwen3.5-35B-A3B has them: its ends are two tensors."""
    kept = {name: value for name, value in dense.items() if name != "intermediate_size"}
    return kept | {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 64,
        "num_experts": experts,
        "num_experts_per_tok": min(2, experts),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 96,
        "tie_word_embeddings": False,
    }


def generation_config(bos: int, eos: int, version: str) -> dict[str, Any]:
    """generation_config.json, as published for both generations."""
    return {
        "_from_model_config": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "transformers_version": version,
    }


def preprocessor_config(family: Family, query_num: int) -> dict[str, Any]:
    """preprocessor_config.json of a family in the layout of the published one."""
    published = {**family.published.preprocessor}
    numbered = {"im_id_start": "<image_id>", "im_id_end": "</image_id>"} if "use_image_id" in published else {}
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {
            "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
        },
        "processor_class": "MiniCPMVProcessor",
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        **numbered,
        **PIXELS,
        **published,
        "scale_resolution": SCALE_RESOLUTION,
        "image_feature_size": query_num,
    }


def processor_config(family: Family) -> dict[str, Any]:
    """processor_config.json of a family whose processor is in transformers."""
    kind, mode = family.published.processors, family.published.config["downsample_mode"]
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_mode": mode,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_slice_nums": 9,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "scale_resolution": SCALE_RESOLUTION,
        "slice_mode": True,
        "use_image_id": True,
    }
    video = {"do_sample_frames": True, "max_num_frames": 128, "max_slice_nums": 1, "stack_frames": 1}
    return {
        "image_processor": {**shared, **family.published.preprocessor, "image_processor_type": f"{kind}ImageProcessor"},
        "processor_class": processor_class(family),
        "video_processor": {**shared, **video, "video_processor_type": f"{kind}VideoProcessor"},
    }


def processor_class(family: Family) -> str:
    """Class of transformers that joins tokenizer, image processor and video processor."""
    return family.auto_mapping[0].replace("ForConditionalGeneration", "Processor")
