"""MiniCPM-o 4.5: the vision part of 2.6, a Whisper encoder, Qwen3 8B."""

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
    slices,
)
from finetune.families.family import Config, Family, Network
from finetune.families.settings import NUMBERED, O4_5_AUDIO
from finetune.templates.chatml_thinking import ROLES, render
from finetune.templates.rendering import Layout

_TOKENS = (*SLICE_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS)
_SETTINGS = {**NUMBERED, **O4_5_AUDIO}


def _matches(config: Config) -> bool:
    return published_as(config, "minicpmo", "4.5")


def _layout(config: Config) -> Layout:
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
    matches=_matches,
    network=Network(vision="navit_siglip", positions="grid", resampler="plain", language="qwen3", audio="whisper"),
    video=SINGLE_FRAMES,
    settings=_SETTINGS,
    slice_spec=partial(slices, _SETTINGS),
    audio_spec=partial(audio_spec, _SETTINGS),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, *AUDIO_TOKENS, *SPEECH_TOKENS, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=OMNI_PARTS,
    lora_targets=OMNI_LORA,
    # Whisper's sine-cosine positions, stored in the checkpoint; a constant in the official model.
    fixed_parameters=("apm.embed_positions.weight",),
)
