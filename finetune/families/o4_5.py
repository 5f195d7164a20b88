"""``Family`` of MiniCPM-o 4.5: the vision tower and resampler of 2.6, a Whisper encoder, Qwen3 8B."""

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
from finetune.families.published import NAVIT, NUMBERED_PIXELS, OMNI, QWEN3_8B, Published
from finetune.families.settings import O4_5_AUDIO, WITH_IMAGE_IDS
from finetune.templates import duplex
from finetune.templates.chatml_thinking import ROLES, render
from finetune.templates.duplex import render_timeline
from finetune.templates.prompt_types import PromptLayout

_TOKENS = (*SLICE_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS)
_SETTINGS = {**WITH_IMAGE_IDS, **O4_5_AUDIO}


def _matches(config: Config) -> bool:
    return published_as(config, "minicpmo", "4.5")


def _layout(config: Config) -> PromptLayout:
    return replace(
        numbered_layout(config),
        thinking_prefill=False,
        # The published chat code uses this form for every answer to audio, with or without speech output.
        speech=SPEECH_TOKENS[3:4],
        speech_end=SPEECH_TOKENS[4],
        spoken="with audio",
    )


O4_5 = Family(
    name="o4_5",
    title="MiniCPM-o 4.5",
    hub_id="openbmb/MiniCPM-o-4_5",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v", "minicpm_o"),
    published=Published(
        config={
            **NAVIT,
            **QWEN3_8B,
            **OMNI,
            "version": "4.5",
            "audio_chunk_length": 1.0,
            "audio_pool_step": 5,
            "slice_config": {"max_slice_nums": 1, "patch_size": 14, "scale_resolution": 448},
            "stream_input": True,
        },
        preprocessor={**NUMBERED_PIXELS, "audio_pool_step": 5, "version": 4.5},
    ),
    matches=_matches,
    network=Network(vision="navit_siglip", positions="grid", resampler="plain", language="qwen3", audio="whisper"),
    video=SINGLE_FRAMES,
    settings=_SETTINGS,
    slice_spec=partial(slicing, _SETTINGS),
    audio_spec=partial(audio_spec, _SETTINGS),
    layout=_layout,
    render=render,
    render_timeline=render_timeline,
    roles=ROLES,
    control_tokens=(*_TOKENS, *AUDIO_TOKENS, *SPEECH_TOKENS, *duplex.TOKENS, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=OMNI_PARTS,
    lora_targets=OMNI_LORA,
    # Whisper's sine-cosine positions, stored in the checkpoint; a constant in the official model.
    fixed_parameters=("apm.embed_positions.weight",),
    llama_cpp=LlamaCpp(version=100045),
)
