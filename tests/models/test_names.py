"""Parameter names, shapes and sizes of the published checkpoints, on the meta device."""

from __future__ import annotations

import hashlib

import pytest
import torch

from finetune.models import MiniCPMO, MiniCPMOConfig, MiniCPMV, MiniCPMVConfig

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
SIGLIP = {**LLAMA3_V2_5["vision_config"], "model_type": "siglip"}
V2_6 = {
    "model_type": "minicpmv",
    "version": 2.6,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 151666,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "query_num": 64,
    "slice_mode": True,
    "patch_size": 14,
    "drop_vision_last_layer": False,
    "vision_config": SIGLIP,
}
V4_5 = {
    **V2_6,
    "version": 4.5,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "vocab_size": 151748,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "sliding_window": None,
    "rope_scaling": None,
}
WHISPER_MEDIUM = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}
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


def audio_names(layers: int) -> set[str]:
    parts = [f"self_attn.{p}_proj{s}" for p in ("q", "v", "out") for s in WB] + ["self_attn.k_proj.weight"]
    parts += [f"{part}{s}" for part in ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2") for s in WB]
    names = {f"apm.layers.{i}.{part}" for i in range(layers) for part in parts}
    names |= {f"apm.{m}{s}" for m in ("conv1", "conv2", "layer_norm") for s in WB}
    names |= {f"audio_projection_layer.linear{i}{s}" for i in (1, 2) for s in WB}
    return names | {"apm.embed_positions.weight"}


def on_meta(config: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        if config["model_type"] == "minicpmo":
            return MiniCPMO(MiniCPMOConfig(**config)).state_dict()
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


# sha256 of the sorted keys of weight_map in the published model.safetensors.index.json, joined by newlines
INDEX_SHA256 = {
    "v2_0": "42f50e253be62d1116e7d759c1490f52c0f2baa113eb71003e0de67e0df84e4c",
    "v2_6": "0c5eeccf6a356e7bbce397cd57a1e3101aff36e0d5752d10a0d34e4b3d3a3e48",
    "v4_5": "8ccff7b8ee0b0ef6e04b87da21e447b95f995989d2b307fbaa7a6eb77735bfc8",
}


@pytest.mark.parametrize(
    ("config", "count", "size", "digest"),
    [
        pytest.param(V2_0, 694, 6_869_931_584, INDEX_SHA256["v2_0"], id="v2_0"),
        pytest.param(V2_6, 789, 16_198_350_304, INDEX_SHA256["v2_6"], id="v2_6"),
        pytest.param(V4_5, 849, 17_391_790_560, INDEX_SHA256["v4_5"], id="v4_5"),
    ],
)
def test_names_are_those_of_the_published_index(config: dict, count: int, size: int, digest: str) -> None:
    state = on_meta(config)
    assert len(state) == count
    assert sum(tensor.numel() * 2 for tensor in state.values()) == size
    assert hashlib.sha256("\n".join(sorted(state)).encode()).hexdigest() == digest


@pytest.mark.parametrize("base", [V2_6, V4_5], ids=["o2_6", "o4_5"])
def test_what_hearing_adds(base: dict) -> None:
    audio = {"model_type": "minicpmo", "audio_config": WHISPER_MEDIUM, "audio_pool_step": 2}
    state = on_meta(base | audio)
    assert set(state) - set(on_meta(base)) == audio_names(24)
    assert state["apm.conv1.weight"].shape == (1024, 80, 3)
    assert state["apm.conv2.weight"].shape == (1024, 1024, 3)
    assert state["apm.embed_positions.weight"].shape == (1500, 1024)
    assert state["audio_projection_layer.linear1.weight"].shape == (base["hidden_size"], 1024)
    assert state["audio_projection_layer.linear2.weight"].shape == (base["hidden_size"], base["hidden_size"])


def test_shapes_of_the_unusual_tensors() -> None:
    state = on_meta(V2_0)
    assert state["vpm.pos_embed"].shape == (1, 729, 1152)
    assert state["resampler.pos_embed"].shape == (64, 2304)
    assert state["resampler.attn.in_proj_weight"].shape == (3 * 2304, 2304)
    state = on_meta(LLAMA3_V2_5)
    assert state["vpm.embeddings.position_embedding.weight"].shape == (4900, 1152)
    assert state["vpm.embeddings.patch_embedding.weight"].shape == (1152, 3, 14, 14)
    assert state["resampler.query"].shape == (96, 4096)
