"""``Family`` of MiniCPM-V 2.6: NaViT SigLIP with two-dimensional positions, 64 queries, Qwen2 7B, ChatML."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from finetune.families.common import (
    CHATML_TOKENS,
    IMAGE_ID_TOKENS,
    NAVIT_LORA,
    REMOTE_CODE_PARTS,
    SINGLE_FRAMES,
    SLICE_TOKENS,
    numbered_layout,
    published_as,
    slicing,
)
from finetune.families.family import Config, Family, LlamaCpp, Network
from finetune.families.published import NAVIT, NUMBERED_PIXELS, QWEN2_7B, Published
from finetune.families.settings import WITH_IMAGE_IDS
from finetune.templates.chatml import ROLES, render
from finetune.templates.prompt_types import PromptLayout

_TOKENS = (*SLICE_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS)


def _matches(config: Config) -> bool:
    return published_as(config, "minicpmv", "2.6")


def _layout(config: Config) -> PromptLayout:
    return replace(numbered_layout(config), default_system="You are a helpful assistant.")


V2_6 = Family(
    name="v2_6",
    title="MiniCPM-V 2.6",
    hub_id="openbmb/MiniCPM-V-2_6",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v",),
    published=Published(
        config={**NAVIT, **QWEN2_7B, "version": 2.6, "vocab_size": 151666}, preprocessor=NUMBERED_PIXELS
    ),
    matches=_matches,
    network=Network(vision="navit_siglip", positions="grid", resampler="plain", language="qwen2"),
    video=SINGLE_FRAMES,
    settings=WITH_IMAGE_IDS,
    slice_spec=partial(slicing, WITH_IMAGE_IDS),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=REMOTE_CODE_PARTS,
    lora_targets=NAVIT_LORA,
    llama_cpp=LlamaCpp(version=3),
)
