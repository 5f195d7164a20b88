"""MiniCPM-Llama3-V 2.5: NaViT SigLIP with one-dimensional positions, 96 queries, Llama-3 8B."""

from __future__ import annotations

from finetune.families.base import Config, Family, Network
from finetune.media.slicing import SliceSpec
from finetune.templates.llama3 import ROLES, render

_IMAGE_TOKENS = ("<unk>", "<image>", "</image>", "<slice>", "</slice>")
_TURN_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _slice_spec(config: Config) -> SliceSpec:
    given = config.get("slice_config") or {}
    return SliceSpec(
        max_slice_nums=given.get("max_slice_nums", 1) if config.get("slice_mode", True) else 1,
        scale_resolution=given.get("scale_resolution", 448),
        patch_size=given.get("patch_size", config.get("patch_size", 14)),
    )


def _matches(config: Config) -> bool:
    if config.get("model_type") != "minicpmv" or "vision_config" not in config:
        return False
    return str(config.get("version", "2.5")) == "2.5"


def _query_num(config: Config) -> int:
    return config["query_num"]


LLAMA3_V2_5 = Family(
    name="llama3_v2_5",
    title="MiniCPM-Llama3-V 2.5",
    hub_id="openbmb/MiniCPM-Llama3-V-2_5",
    llm_type="llama3",
    matches=_matches,
    network=Network(vision="navit_siglip", positions="row", resampler="plain", language="llama"),
    slice_spec=_slice_spec,
    query_num=_query_num,
    render=render,
    roles=ROLES,
    control_tokens=(*_IMAGE_TOKENS, *_TURN_TOKENS, "<|end_of_text|>"),
    required_tokens=(*_IMAGE_TOKENS, *_TURN_TOKENS),
    stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
    lora_targets=r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
)
