"""``Family`` of MiniCPM-OCR 1.0: the architecture of 4.6 with four times its tokens; small print is enlarged."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

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
from finetune.families.family import Config, Family
from finetune.families.published import Published, native_config
from finetune.families.settings import OCR, value_of
from finetune.media.slicing import Enlarging, SliceSpec
from finetune.templates.chatml_thinking import ROLES, render
from finetune.templates.prompt_types import PromptLayout
from finetune.utils.errors import UserError

_TOKENS = (*MARK_TOKENS, *IMAGE_ID_TOKENS, *CHATML_TOKENS, IMAGE_PAD)


def _matches(config: Config) -> bool:
    return config.get("model_type") == "minicpm_ocr"


def _slice_spec(config: Config) -> SliceSpec:
    given = value_of(config, OCR["small_image_upsize"])
    if given not in get_args(Enlarging):
        known = ", ".join(get_args(Enlarging))
        raise UserError(f"the image processor of the checkpoint has small_image_upsize {given!r}; known are {known}")
    return replace(merged_slicing(OCR, config), enlarge=given)


def _layout(config: Config) -> PromptLayout:
    layout = merged_layout(OCR, config)
    return replace(layout, video_ids=layout.image_ids)


OCR1_0 = Family(
    name="ocr1_0",
    title="MiniCPM-OCR 1.0",
    hub_id="openbmb/MiniCPM-OCR-1.0",
    llm_type="qwen",
    llamafactory_templates=("minicpm_v_4_6",),
    published=Published(
        config=native_config("MiniCPMOcr", "minicpm_ocr", "4x"),
        preprocessor={"small_image_upsize": "always"},
        processors="MiniCPMOcr",
        assumed=True,
    ),
    matches=_matches,
    transformers="5.23",
    video=PROCESSED_FRAMES,
    settings=OCR,
    slice_spec=_slice_spec,
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*_TOKENS, VIDEO_PAD, "<|endoftext|>"),
    required_tokens=_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    parts=TRANSFORMERS_PARTS,
    lora_targets=TRANSFORMERS_LORA,
    packing_kernels=LINEAR_ATTENTION,
    inputs="packed_print",
    auto_mapping=("MiniCPMOcrForConditionalGeneration", "transformers.models.minicpm_ocr.modeling_minicpm_ocr"),
)
