"""``Family`` of MiniCPM-V 4.5: a resampler that packs video frames, Qwen3 8B, ChatML with thinking."""

from __future__ import annotations

from functools import partial

from finetune.families.common import (
    CHATML_TOKENS,
    IMAGE_ID_TOKENS,
    NAVIT_LORA,
    PACKED_FRAMES,
    REMOTE_CODE_PARTS,
    SLICE_TOKENS,
    numbered_layout,
    published_as,
    slicing,
)
from finetune.families.family import Config, Family, LlamaCpp, Network
from finetune.families.published import NAVIT, NUMBERED_PIXELS, QWEN3_8B, Published
from finetune.families.settings import WITH_IMAGE_IDS
from finetune.templates.chatml_thinking import ROLES, render

_TOKENS = (*SLICE_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS)


def _matches(config: Config) -> bool:
    return published_as(config, "minicpmv", "4.5")


V4_5 = Family(
    name="v4_5",
    title="MiniCPM-V 4.5",
    hub_id="openbmb/MiniCPM-V-4_5",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v",),
    published=Published(
        config={**NAVIT, **QWEN3_8B, "version": 4.5, "batch_3d_resampler": True}, preprocessor=NUMBERED_PIXELS
    ),
    matches=_matches,
    network=Network(vision="navit_siglip", positions="grid", resampler="temporal", language="qwen3"),
    video=PACKED_FRAMES,
    settings=WITH_IMAGE_IDS,
    slice_spec=partial(slicing, WITH_IMAGE_IDS),
    layout=numbered_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=REMOTE_CODE_PARTS,
    lora_targets=NAVIT_LORA,
    llama_cpp=LlamaCpp(version=6),
)
