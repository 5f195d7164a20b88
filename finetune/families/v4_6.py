"""``Family`` of MiniCPM-V 4.6: NaViT SigLIP that merges 4 x 4 patches, Qwen3.5; model class in transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from finetune.families.common import (
    CHATML_TOKENS,
    IMAGE_ID_TOKENS,
    IMAGE_PAD,
    LINEAR_ATTENTION,
    MARK_TOKENS,
    PROCESSED_FRAMES,
    TRANSFORMERS_LORA,
    TRANSFORMERS_PARTS,
    VIDEO_PAD,
    merged_layout,
    merged_slicing,
)
from finetune.families.family import Config, Family, LlamaCpp
from finetune.families.published import Published, native_config
from finetune.families.settings import TRANSFORMERS
from finetune.templates.chatml_thinking import ROLES, render
from finetune.templates.prompt_types import PromptLayout

_TOKENS = (*MARK_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS, IMAGE_PAD)


def _matches(config: Config) -> bool:
    return config.get("model_type") == "minicpmv4_6"


def _layout(config: Config) -> PromptLayout:
    layout = merged_layout(TRANSFORMERS, config)
    return replace(layout, video_ids=layout.image_ids)


V4_6 = Family(
    name="v4_6",
    title="MiniCPM-V 4.6",
    hub_id="openbmb/MiniCPM-V-4.6",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v_4_6",),
    published=Published(
        config={**native_config("MiniCPMV4_6", "minicpmv4_6"), "image_size": 448, "drop_vision_last_layer": False},
        processors="MiniCPMV4_6",
        assumed=True,
    ),
    matches=_matches,
    video=PROCESSED_FRAMES,
    settings=TRANSFORMERS,
    slice_spec=partial(merged_slicing, TRANSFORMERS),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, VIDEO_PAD, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=TRANSFORMERS_PARTS,
    lora_targets=TRANSFORMERS_LORA,
    packing_kernels=LINEAR_ATTENTION,
    inputs="packed",
    auto_mapping=("MiniCPMV4_6ForConditionalGeneration", "transformers.models.minicpmv4_6.modeling_minicpmv4_6"),
    llama_cpp=LlamaCpp(),
)
