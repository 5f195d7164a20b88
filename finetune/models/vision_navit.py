"""NaViT-style SigLIP vision tower for images of any size (2.5 and later), with the official parameter names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.positions import POSITION_IDS, Sizes
from finetune.models.varlen_attention import split_attention
from finetune.models.vision import PatchProjection, VisionTower, normalize


class NavitEmbeddings(nn.Module):
    """Patch projection plus learned positions."""

    def __init__(self, hidden: int, patch: int, side: int, positions: str) -> None:
        super().__init__()
        self.patch_embedding = PatchProjection(3, hidden, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(side * side, hidden)
        self.patch, self.side, self.position_ids = patch, side, POSITION_IDS[positions]

    def forward(self, patches: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """(N, 3*P*P) bytes to (N, D)."""
        pixels = normalize(patches, self.patch, self.patch_embedding.weight.dtype)
        ids = self.position_ids(sizes, self.side).to(patches.device)
        return self.patch_embedding(pixels).flatten(1) + self.position_embedding(ids)


class NavitSelfAttention(nn.Module):
    """Multi-head attention inside each item."""

    def __init__(self, config: MiniCPMVConfig, hidden: int, heads: int) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(N, D) to (N, D); ``lengths`` are the patches per item."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = split_attention(query, key, value, lengths, lengths, self.config._attn_implementation)
        return self.out_proj(x.flatten(1))


class NavitMLP(nn.Module):
    """Two linear layers with the tanh form of GELU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class NavitLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer on (N, D)."""

    def __init__(self, config: MiniCPMVConfig, hidden: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden, eps=eps)
        self.self_attn = NavitSelfAttention(config, hidden, heads)
        self.layer_norm2 = nn.LayerNorm(hidden, eps=eps)
        self.mlp = NavitMLP(hidden, inner)

    def forward(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(N, D) to (N, D); ``lengths`` are the patches per item."""
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        return x + self.mlp(self.layer_norm2(x))


class NavitEncoder(nn.Module):
    """The transformer layers."""

    def __init__(self, layers: Sequence[NavitLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(N, D) to (N, D); ``lengths`` are the patches per item."""
        for layer in self.layers:
            x = layer(x, lengths)
        return x


class NavitSiglip(VisionTower):
    """SigLIP so400m/14 at 980 px with a 70 x 70 position table."""

    _no_split_modules = ["NavitEmbeddings", "NavitLayer"]

    def __init__(self, config: MiniCPMVConfig, positions: str) -> None:
        super().__init__(config)
        vision = config.vision_config
        hidden, inner, heads = vision["hidden_size"], vision["intermediate_size"], vision["num_attention_heads"]
        eps = vision.get("layer_norm_eps", 1e-6)
        depth = vision["num_hidden_layers"] - (1 if config.read("drop_vision_last_layer", True) else 0)
        side = vision["image_size"] // vision["patch_size"]
        self.output_size = hidden
        self.embeddings = NavitEmbeddings(hidden, vision["patch_size"], side, positions)
        self.encoder = NavitEncoder([NavitLayer(config, hidden, inner, heads, eps) for _ in range(depth)])
        self.post_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.post_init()

    def forward(self, patches: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """As in VisionTower."""
        lengths = [height * width for height, width in sizes]
        return self.post_layernorm(self.encoder(self.embeddings(patches, sizes), lengths))

    def get_input_embeddings(self) -> nn.Module:
        """The patch projection; adapters with reentrant checkpointing need its output to require a gradient."""
        return self.embeddings.patch_embedding
