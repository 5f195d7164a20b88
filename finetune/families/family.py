"""What differs between generations: values and references to functions, never a switch for another module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.families.settings import Table
from finetune.media.audio_layout import AudioPlan, AudioSpec
from finetune.media.slicing import SlicePlan, SliceSpec
from finetune.media.video_sampling import Group, Length, VideoOptions
from finetune.sample import Sample
from finetune.templates.rendering import Layout, Rendered, Vocabulary

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Names of the parts that ``finetune.models`` assembles; each is a key of a builder table there.

    Where transformers has the whole network as one class, the names only say what is in it.

    Attributes:
        vision: vision tower.
        positions: rule for the vision position ids.
        resampler: resampler variant.
        language: language backbone.
        audio: audio tower, None for families that cannot hear.
    """

    vision: str
    positions: str
    resampler: str
    language: str
    audio: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """How a family looks at videos.

    Attributes:
        sample: which frames of a video of this length.
        defaults: reads the options of a checkpoint, as ``Family.slice_spec`` does.
        between: text between two groups of frames.
        options: names of the options that mean something to it.
    """

    sample: Callable[[Length, VideoOptions], list[Group]]
    defaults: Callable[[Config], VideoOptions]
    separator: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One generation of the model.

    Attributes:
        name: short name, as in ``--family`` and the golden folders.
        title: the published name.
        hub_id: the published checkpoint.
        llm_type: the official LLM_TYPE value.
        matches: whether a config.json (as a dictionary) belongs to this family.
        transformers: the oldest version of it that has the network; empty where every supported one does.
        network: the parts of our own network; None where transformers has the network as one class.
        settings: which file of a folder each value is read from that shapes prompts or pixels.
        slice_spec: reads the slicing settings by that table, from config.json with what the folder says of processors.
        audio_spec: reads how the checkpoint hears in the same way; None for families that cannot.
        video: how it looks at videos; None for families that take none.
        layout: reads how prompts are written, in the same way.
        render: conversation and slice plans or placeholders of sound (one per medium, reading order) to ids and
            labels, born together. With ``generate`` the ids end where the model has to answer.
        roles: roles its template has.
        control_tokens: tokens that steer the format; never produced by user text.
        required_tokens: tokens that must resolve to one id in the tokenizer, or loading fails.
        stop_tokens: generation stops on any of them.
        inputs: how images reach the network; a key of the table in ``finetune.encoding.pixel_inputs``.
        parts: part of the network ("vision", "resampler", "llm", "audio") to the modules it consists of.
        lora_targets: part to the regular expression (full match on module names) of its LoRA layers.
        auto_mapping: class and module by which peft finds the base of an adapter.
        fixed_parameters: names of parameters that are tables; full finetuning leaves them as they are.
        inference_template: the chat template of the published checkpoint, where the published training scripts leave
            another one in their results; else empty.
        packing_kernels: packages (module to distribution) without whose kernels the samples of one row leak into each
            other in its network; empty where nothing is needed.
        chat_gives_context: whether ``model.chat`` returns answer, context and history instead of the answer alone.
    """

    name: str
    title: str
    hub_id: str
    llm_type: str
    matches: Callable[[Config], bool]
    transformers: str = ""
    network: Network | None = None
    settings: Table
    slice_spec: Callable[[Config], SliceSpec]
    layout: Callable[[Config], Layout]
    render: Callable[[Sample, Sequence[SlicePlan | AudioPlan], Vocabulary, Layout, bool], Rendered]
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
    chat_gives_context: bool = False
