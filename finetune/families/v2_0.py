"""``Family`` of MiniCPM-V 2.0: timm SigLIP, 64 queries, MiniCPM-2.4B, <用户>/<AI> prompt."""

from __future__ import annotations

from functools import partial

from finetune.families.common import REMOTE_CODE_PARTS, SLICE_TOKENS, TIMM_LORA, slicing
from finetune.families.family import Config, Family, Network
from finetune.families.published import Published
from finetune.families.settings import CONFIG_FIRST, value_of
from finetune.templates.minicpm import ROLES, render
from finetune.templates.prompt_types import PromptLayout


# Named functions, because families are pickled for worker processes.
def _matches(config: Config) -> bool:
    if config.get("model_type") != "minicpmv" or "version" in config:
        return False
    # MiniCPM-V 1.0 shares vision_encoder and hidden size but has no slice_mode (one 448 px image).
    return "vision_encoder" in config and "slice_mode" in config


def _layout(config: Config) -> PromptLayout:
    return PromptLayout(query_num=value_of(config, CONFIG_FIRST["query_num"]))


V2_0 = Family(
    name="v2_0",
    title="MiniCPM-V 2.0",
    hub_id="openbmb/MiniCPM-V-2",
    llm_type="minicpm",
    published=Published(
        config={
            "architectures": ["MiniCPMV"],
            "attention_bias": False,
            "dim_model_base": 256,
            "drop_vision_last_layer": True,
            "hidden_size": 2304,
            "image_size": 448,
            "intermediate_size": 5760,
            "max_position_embeddings": 4096,
            "max_slice_nums": 9,
            "model_type": "minicpmv",
            "num_attention_heads": 36,
            "num_hidden_layers": 40,
            "num_key_value_heads": 36,
            "patch_size": 14,
            "query_num": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "scale_depth": 1.4,
            "scale_emb": 12,
            "scale_resolution": 448,
            "slice_mode": True,
            "tie_word_embeddings": False,
            "transformers_version": "4.36.0",
            "use_cache": True,
            "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
            "vocab_size": 122753,
        }
    ),
    matches=_matches,
    network=Network(vision="timm_siglip", positions="resampled", resampler="query_positions", language="minicpm"),
    settings=CONFIG_FIRST,
    slice_spec=partial(slicing, CONFIG_FIRST),
    layout=_layout,
    render=render,
    roles=ROLES,
    control_tokens=(*SLICE_TOKENS, "<s>", "</s>"),
    required_tokens=(*SLICE_TOKENS, "<s>", "</s>"),
    stop_tokens=("</s>",),
    parts=REMOTE_CODE_PARTS,
    lora_targets=TIMM_LORA,
    # Sin-cos positions of the queries, stored in the checkpoint; a constant in the official model.
    fixed_parameters=("resampler.pos_embed",),
    chat_gives_context=True,
)
