"""``Family`` of MiniCPM-Llama3-V 2.5: NaViT SigLIP with one-dimensional positions, 96 queries, Llama-3 8B."""

from __future__ import annotations

from functools import partial

from finetune.families.common import NAVIT_LORA, REMOTE_CODE_PARTS, SLICE_TOKENS, slicing
from finetune.families.family import Config, Family, LlamaCpp, Network
from finetune.families.published import NAVIT, PIXELS, SIGLIP, Published
from finetune.families.settings import PROCESSOR_FIRST, value_of
from finetune.templates.llama3 import ROLES, render
from finetune.templates.prompt_types import PromptLayout

_TURN_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INFERENCE_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def _matches(config: Config) -> bool:
    if config.get("model_type") != "minicpmv" or "vision_config" not in config:
        return False
    return str(config.get("version", "2.5")) == "2.5"


def _layout(config: Config) -> PromptLayout:
    return PromptLayout(query_num=value_of(config, PROCESSOR_FIRST["query_num"]))


LLAMA3_V2_5 = Family(
    name="llama3_v2_5",
    title="MiniCPM-Llama3-V 2.5",
    hub_id="openbmb/MiniCPM-Llama3-V-2_5",
    llm_type="llama3",
    published=Published(
        config={
            **NAVIT,
            "version": "2.5",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "query_num": 96,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "vision_config": {**SIGLIP, "model_type": "idefics2"},
            "vocab_size": 128256,
        },
        preprocessor={**PIXELS, "image_feature_size": 96, "version": 2.5},
    ),
    matches=_matches,
    network=Network(vision="navit_siglip", positions="row", resampler="plain", language="llama"),
    settings=PROCESSOR_FIRST,
    slice_spec=partial(slicing, PROCESSOR_FIRST),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*SLICE_TOKENS, *_TURN_TOKENS, "<|end_of_text|>"),
    required_tokens=(*SLICE_TOKENS, *_TURN_TOKENS),
    stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
    parts=REMOTE_CODE_PARTS,
    lora_targets=NAVIT_LORA,
    inference_template=_INFERENCE_TEMPLATE,
    llama_cpp=LlamaCpp(version=2),
)
