"""MiniCPM-V 2.0: timm SigLIP, 64 queries, MiniCPM-2.4B, <用户>/<AI> prompt."""

from __future__ import annotations

from functools import partial

from finetune.families.common import OWN_PARTS, SLICE_TOKENS, TIMM_LORA, slices
from finetune.families.family import Config, Family, Network
from finetune.families.settings import CONFIG_FIRST, value_of
from finetune.templates.minicpm import ROLES, render
from finetune.templates.rendering import Layout


# Named functions, because families are pickled for worker processes.
def _matches(config: Config) -> bool:
    if config.get("model_type") != "minicpmv" or "version" in config:
        return False
    # MiniCPM-V 1.0 shares vision_encoder and hidden size but has no slice_mode (one 448 px image).
    return "vision_encoder" in config and "slice_mode" in config


def _layout(config: Config) -> Layout:
    return Layout(query_num=value_of(config, CONFIG_FIRST["query_num"]))


V2_0 = Family(
    name="v2_0",
    title="MiniCPM-V 2.0",
    hub_id="openbmb/MiniCPM-V-2",
    llm_type="minicpm",
    matches=_matches,
    network=Network(vision="timm_siglip", positions="resampled", resampler="query_positions", language="minicpm"),
    settings=CONFIG_FIRST,
    slice_spec=partial(slices, CONFIG_FIRST),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*SLICE_TOKENS, "<s>", "</s>"),
    required_tokens=(*SLICE_TOKENS, "<s>", "</s>"),
    stop_tokens=("</s>",),
    parts=OWN_PARTS,
    lora_targets=TIMM_LORA,
    # Sin-cos positions of the queries, stored in the checkpoint; a constant in the official model.
    fixed_parameters=("resampler.pos_embed",),
    chat_gives_context=True,
)
