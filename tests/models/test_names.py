"""Names, shapes and bytes of the published checkpoints, on the meta device."""

from __future__ import annotations

import hashlib

import pytest
import torch

from finetune.models import MiniCPMV, MiniCPMVConfig

V2_0 = {
    "model_type": "minicpmv",
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_hidden_layers": 40,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "vocab_size": 122753,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    "query_num": 64,
    "slice_mode": True,
    "patch_size": 14,
    "drop_vision_last_layer": True,
    "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
}
LLAMA3_V2_5 = {
    "model_type": "minicpmv",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "query_num": 96,
    "slice_mode": True,
    "patch_size": 14,
    "drop_vision_last_layer": False,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
WB = (".weight", ".bias")


def llm_names(layers: int) -> set[str]:
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = {f"llm.model.layers.{i}.{part}.weight" for i in range(layers) for part in parts}
    return names | {"llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight"}


def resampler_names() -> set[str]:
    modules = {f"resampler.{m}{s}" for m in ("ln_q", "ln_kv", "ln_post", "attn.out_proj") for s in WB}
    bare = {"query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"}
    return modules | {f"resampler.{name}" for name in bare}


def timm_names(blocks: int) -> set[str]:
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = {f"vpm.blocks.{i}.{part}{s}" for i in range(blocks) for part in parts for s in WB}
    return names | {f"vpm.{m}{s}" for m in ("patch_embed.proj", "norm") for s in WB} | {"vpm.pos_embed"}


def navit_names(layers: int) -> set[str]:
    parts = [
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
    ]
    names = {f"vpm.encoder.layers.{i}.{part}{s}" for i in range(layers) for part in parts for s in WB}
    names |= {f"vpm.{m}{s}" for m in ("embeddings.patch_embedding", "post_layernorm") for s in WB}
    return names | {"vpm.embeddings.position_embedding.weight"}


def on_meta(config: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return MiniCPMV(MiniCPMVConfig(**config)).state_dict()


@pytest.mark.parametrize(
    ("config", "names", "size"),
    [
        pytest.param(
            V2_0, llm_names(40) | timm_names(26) | resampler_names() | {"resampler.pos_embed"}, 6_869_931_584, id="v2_0"
        ),
        pytest.param(
            LLAMA3_V2_5, llm_names(32) | navit_names(27) | resampler_names(), 17_074_184_672, id="llama3_v2_5"
        ),
    ],
)
def test_names_and_bytes_are_the_published_ones(config: dict, names: set[str], size: int) -> None:
    state = on_meta(config)
    assert set(state) == names
    assert len(state) == {"v2_0": 694, "llama3_v2_5": 741}["v2_0" if config is V2_0 else "llama3_v2_5"]
    assert sum(tensor.numel() * 2 for tensor in state.values()) == size


def test_names_of_v2_0_are_those_of_the_published_index() -> None:
    names = "\n".join(sorted(on_meta(V2_0)))
    assert hashlib.sha256(names.encode()).hexdigest() == INDEX_SHA256


# sha256 of the sorted keys of weight_map in openbmb/MiniCPM-V-2's model.safetensors.index.json, joined by newlines
INDEX_SHA256 = "42f50e253be62d1116e7d759c1490f52c0f2baa113eb71003e0de67e0df84e4c"


def test_shapes_of_the_unusual_tensors() -> None:
    state = on_meta(V2_0)
    assert state["vpm.pos_embed"].shape == (1, 729, 1152)
    assert state["resampler.pos_embed"].shape == (64, 2304)
    assert state["resampler.attn.in_proj_weight"].shape == (3 * 2304, 2304)
    state = on_meta(LLAMA3_V2_5)
    assert state["vpm.embeddings.position_embedding.weight"].shape == (4900, 1152)
    assert state["vpm.embeddings.patch_embedding.weight"].shape == (1152, 3, 14, 14)
    assert state["resampler.query"].shape == (96, 4096)
