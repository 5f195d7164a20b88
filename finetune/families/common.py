"""Values and rules that several generations share."""

from __future__ import annotations

from finetune.families.base import Config
from finetune.media.slicing import SliceSpec
from finetune.templates.rendering import Layout

# Part of the network -> the modules it consists of.
OWN_PARTS = {"vision": ("vpm",), "resampler": ("resampler",), "llm": ("llm",)}
OMNI_PARTS = {**OWN_PARTS, "audio": ("apm", "audio_projection_layer")}

# Part of the network -> its layers that get adapters.
NAVIT_LORA = {
    "llm": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    "vision": r"vpm\.encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "resampler": r"resampler\.(kv_proj|attn\.out_proj)",
}
TIMM_LORA = {**NAVIT_LORA, "vision": r"vpm\.blocks\.\d+\.attn\.(qkv|proj)"}
OMNI_LORA = {**NAVIT_LORA, "audio": r"apm\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"}

SLICE_TOKENS = ("<unk>", "<image>", "</image>", "<slice>", "</slice>")
IMAGE_ID_TOKENS = ("<image_id>", "</image_id>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
AUDIO_TOKENS = ("<|audio_start|>", "<|audio|>", "<|audio_end|>")


def slice_config(config: Config) -> SliceSpec:
    """The slicing settings of 2.5 and later: a dictionary of their own; without it images stay whole."""
    given = config.get("slice_config") or {}
    return SliceSpec(
        max_slice_nums=given.get("max_slice_nums", 1) if config.get("slice_mode", True) else 1,
        scale_resolution=given.get("scale_resolution", 448),
        patch_size=given.get("patch_size", config.get("patch_size", 14)),
    )


def numbered_layout(config: Config) -> Layout:
    """2.6 and later: 64 placeholders per item and numbered images, where config.json says nothing else."""
    return Layout(query_num=config.get("query_num", 64), image_ids=config.get("use_image_id", True))


def published_as(config: Config, model_type: str, version: str) -> bool:
    """Whether config.json has this model_type and version (a number or a string)."""
    return config.get("model_type") == model_type and str(config.get("version")) == version
