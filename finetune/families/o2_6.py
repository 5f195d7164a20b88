"""``Family`` of MiniCPM-o 2.6: the architecture of MiniCPM-V 2.6 plus a Whisper encoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from finetune.families.common import (
    AUDIO_TOKENS,
    CHATML_TOKENS,
    IMAGE_ID_TOKENS,
    OMNI_LORA,
    OMNI_PARTS,
    SINGLE_FRAMES,
    SLICE_TOKENS,
    SPEECH_TOKENS,
    audio_spec,
    numbered_layout,
    published_as,
    slicing,
)
from finetune.families.family import Config, Family, LlamaCpp, Network
from finetune.families.published import NAVIT, NUMBERED_PIXELS, OMNI, QWEN2_7B, Published
from finetune.families.settings import O2_6_AUDIO, WITH_IMAGE_IDS
from finetune.templates.chatml import ROLES, render
from finetune.templates.prompt_types import PromptLayout

_TOKENS = (*SLICE_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS)
_SETTINGS = {**WITH_IMAGE_IDS, **O2_6_AUDIO}


def _matches(config: Config) -> bool:
    return published_as(config, "minicpmo", "2.6")


def _layout(config: Config) -> PromptLayout:
    # Default from reports; the checkpoint's own chat template decides.
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    return replace(
        numbered_layout(config),
        default_system=system,
        tools=True,
        # The published chat code uses this form for every answer to audio, with or without speech output.
        speech=SPEECH_TOKENS[:4],
        speech_end=SPEECH_TOKENS[4],
        spoken="with audio",
        assumed=("default_system",),
    )


O2_6 = Family(
    name="o2_6",
    title="MiniCPM-o 2.6",
    hub_id="openbmb/MiniCPM-o-2_6",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v", "minicpm_o"),
    published=Published(
        config={
            **NAVIT,
            **QWEN2_7B,
            **OMNI,
            "version": 2.6,
            "chunk_input": True,
            "audio_pool_step": 2,
            "vocab_size": 151700,
        },
        preprocessor=NUMBERED_PIXELS,
        assumed=True,
    ),
    matches=_matches,
    network=Network(vision="navit_siglip", positions="grid", resampler="plain", language="qwen2", audio="whisper"),
    video=SINGLE_FRAMES,
    settings=_SETTINGS,
    slice_spec=partial(slicing, _SETTINGS),
    audio_spec=partial(audio_spec, _SETTINGS),
    layout=_layout,
    render=render,
    roles=(*ROLES, "tool"),
    control_tokens=(*_TOKENS, *AUDIO_TOKENS, *SPEECH_TOKENS, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=OMNI_PARTS,
    lora_targets=OMNI_LORA,
    # Whisper's sine-cosine positions, stored in the checkpoint; a constant in the official model.
    fixed_parameters=("apm.embed_positions.weight",),
    llama_cpp=LlamaCpp(version=4),
)
