"""``Family`` of MiniCPM-V 4.7: as 4.6, with multimodal RoPE (time, row, column); model class in transformers."""

from __future__ import annotations

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

_TOKENS = (*MARK_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS, IMAGE_PAD)


def _matches(config: Config) -> bool:
    return config.get("model_type") == "minicpmv4_7"


V4_7 = Family(
    name="v4_7",
    title="MiniCPM-V 4.7",
    hub_id="openbmb/MiniCPM-V-4.7-1B",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v_4_6",),
    published=Published(
        config={**native_config("MiniCPMV4_7", "minicpmv4_7"), "image_size": 448},
        processors="MiniCPMV4_6",
        assumed=True,
        experts=True,
    ),
    matches=_matches,
    video=PROCESSED_FRAMES,
    settings=TRANSFORMERS,
    slice_spec=partial(merged_slicing, TRANSFORMERS),
    layout=partial(merged_layout, TRANSFORMERS),
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, VIDEO_PAD, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=TRANSFORMERS_PARTS,
    lora_targets=TRANSFORMERS_LORA,
    packing_kernels=LINEAR_ATTENTION,
    inputs="canvas",
    auto_mapping=("MiniCPMV4_7ForConditionalGeneration", "transformers.models.minicpmv4_7.modeling_minicpmv4_7"),
    llama_cpp=LlamaCpp(),
)
