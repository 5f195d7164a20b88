"""``Family`` of MiniCPM-V 4.0: the vision tower and resampler of 2.6, MiniCPM4 3B in the shape of Llama, ChatML."""

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
from finetune.families.published import NAVIT, NUMBERED_PIXELS, Published
from finetune.families.settings import WITH_IMAGE_IDS
from finetune.templates.chatml import ROLES, render
from finetune.templates.prompt_types import PromptLayout

_TOKENS = (*SLICE_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS)


def _matches(config: Config) -> bool:
    return published_as(config, "minicpmv", "4.0")


def _layout(config: Config) -> PromptLayout:
    # Defaults from reports; the checkpoint's own tokenizer and chat template decide.
    return replace(numbered_layout(config), bos="<s>", assumed=("bos", "default_system"))


V4_0 = Family(
    name="v4_0",
    title="MiniCPM-V 4.0",
    hub_id="openbmb/MiniCPM-V-4",
    llm_type="llama",
    llamafactory_templates=("minicpm_v",),
    published=Published(
        config={
            **NAVIT,
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
            "transformers_version": "4.46.3",
            "vocab_size": 73448,
        },
        preprocessor=NUMBERED_PIXELS,
        assumed=True,
    ),
    matches=_matches,
    network=Network(vision="navit_siglip", positions="grid", resampler="plain", language="llama"),
    video=SINGLE_FRAMES,
    settings=WITH_IMAGE_IDS,
    slice_spec=partial(slicing, WITH_IMAGE_IDS),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, "<s>", "</s>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "</s>"),
    parts=REMOTE_CODE_PARTS,
    lora_targets=NAVIT_LORA,
    llama_cpp=LlamaCpp(version=5),
)
