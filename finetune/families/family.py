"""``Family``: one model version (2.6, 4.5, ...): its architecture, prompt format, LoRA targets and detection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.families.published import Published
from finetune.families.settings import Table
from finetune.media.audio_layout import AudioPlan, AudioSpec
from finetune.media.slicing import SlicePlan, SliceSpec
from finetune.media.video_sampling import Group, Length, VideoOptions
from finetune.sample import Sample
from finetune.templates.prompt_types import PromptLayout, PromptTokenizer, TokenizedPrompt

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The architecture of our own model classes; each value is a key of a builder table in ``finetune.models``.

    Attributes:
        vision: vision tower.
        positions: rule of the vision position ids.
        resampler: resampler variant.
        language: language model.
        audio: audio tower, None for families without audio input.
    """

    vision: str
    positions: str
    resampler: str
    language: str
    audio: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """The video input of a family.

    Attributes:
        sample: frame sampling by the length of the video.
        defaults: reads the video options of a checkpoint, as ``Family.slice_spec``.
        separator: text between two groups of frames.
        options: names of the video options that the family supports.
    """

    sample: Callable[[Length, VideoOptions], list[Group]]
    defaults: Callable[[Config], VideoOptions]
    separator: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """How llama.cpp converts a family.

    Attributes:
        version: --minicpmv_version of the script for the image encoder, for a model that is taken apart first; None
            for one whose folder the converter reads as it is.
    """

    version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family (a generation such as MiniCPM-V 2.6).

    Attributes:
        name: short name, as in ``--family`` and the golden folders.
        title: the published name.
        hub_id: hub id of the published checkpoint.
        llm_type: LLM_TYPE value of the official scripts.
        llamafactory_templates: its ``template`` names in LLaMA-Factory and published guides.
        published: configuration of the published checkpoint.
        matches: whether a config.json (as a dictionary) belongs to this family.
        transformers: oldest version with its model classes; empty if every supported version works.
        network: architecture of our own model classes; None if the model class is in transformers.
        settings: from which files of a checkpoint each prompt or pixel setting is read.
        slice_spec: reads the slicing settings by that table from ``BaseCheckpoint.settings``.
        audio_spec: reads the audio settings in the same way; None for families without audio input.
        video: video input; None for families without it.
        layout: reads the prompt layout in the same way.
        render: from the conversation and one plan per medium (reading order) to token ids and labels. With ``generate``
            the ids end with the generation prompt.
        render_timeline: the same from a full-duplex record, without ``generate``; None if it has no such prompt.
        roles: roles of its template.
        control_tokens: control tokens of the prompt format; never produced by user text.
        required_tokens: tokens that the tokenizer must have, or loading fails.
        stop_tokens: tokens that end generation.
        inputs: format of the pixel inputs, a key of ``finetune.encoding.pixel_inputs.INPUTS``.
        parts: part of the model ("vision", "resampler", "llm", "audio") to its modules.
        lora_targets: part to the regular expression (full match on module names) of its LoRA target modules.
        auto_mapping: class and module by which peft finds the base model of an adapter.
        fixed_parameters: names of parameters that are constant tables and never trained.
        inference_template: chat template of the published checkpoint, if the official training scripts replace it in
            their results; else empty.
        packing_kernels: packages (module to distribution) whose kernels packing needs, so that samples of a row do not
            leak into each other; empty if none.
        llama_cpp: how llama.cpp converts it; None if it has no converter.
        chat_gives_context: whether ``model.chat`` returns answer, context and history instead of the answer only.
    """

    name: str
    title: str
    hub_id: str
    llm_type: str
    llamafactory_templates: tuple[str, ...] = ()
    published: Published
    matches: Callable[[Config], bool]
    transformers: str = ""
    network: Network | None = None
    settings: Table
    slice_spec: Callable[[Config], SliceSpec]
    layout: Callable[[Config], PromptLayout]
    render: Callable[[Sample, Sequence[SlicePlan | AudioPlan], PromptTokenizer, PromptLayout, bool], TokenizedPrompt]
    render_timeline: (
        Callable[[Sample, Sequence[SlicePlan | AudioPlan], PromptTokenizer, PromptLayout], TokenizedPrompt] | None
    ) = None
    roles: tuple[str, ...]
    control_tokens: tuple[str, ...]
    required_tokens: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    lora_targets: Mapping[str, str]
    audio_spec: Callable[[Config], AudioSpec] | None = None
    video: Video | None = None
    inputs: str = "patches"
    auto_mapping: tuple[str, str] = ("AutoModel", "transformers")
    fixed_parameters: tuple[str, ...] = ()
    inference_template: str = ""
    packing_kernels: Mapping[str, str] = field(default_factory=dict)
    llama_cpp: LlamaCpp | None = None
    chat_gives_context: bool = False
