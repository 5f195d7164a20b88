"""timm's SigLIP vision tower (V-2.0): layers and parameter names of timm, applied to the patches of all items at once.

timm's own forward takes images of one size, so that the number of passes would differ between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.initialization import STD, initialize
from finetune.models.positions import Sizes, resampled
from finetune.models.varlen_attention import split_attention
from finetune.models.vision import PatchProjection, VisionTower, normalize


class TimmSelfAttention(nn.Module):
    """Multi-head attention inside each item, on timm's fused projection."""

    def __init__(self, config: MiniCPMVConfig, attention: Any) -> None:
        super().__init__()
        self.config, self.heads = config, attention.num_heads
        self.qkv = attention.qkv
        self.proj = attention.proj

    def forward(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(N, D) to (N, D); ``lengths`` are the patches per item."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        x = split_attention(query, key, value, lengths, lengths, self.config._attn_implementation)
        return self.proj(x.flatten(1))


class TimmBlock(GradientCheckpointingLayer):
    """Pre-norm transformer layer on (N, D), made of the parts of a timm block."""

    def __init__(self, config: MiniCPMVConfig, block: Any) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = TimmSelfAttention(config, block.attn)
        self.norm2 = block.norm2
        self.mlp = block.mlp

    def forward(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(N, D) to (N, D); ``lengths`` are the patches per item."""
        x = x + self.attn(self.norm1(x), lengths)
        return x + self.mlp(self.norm2(x))


class TimmSiglip(VisionTower):
    """A timm vision transformer without class token and without pooling.

    Raises:
        ValueError: the named timm model has parameters that this tower would not use.
    """

    _no_split_modules = ["TimmBlock"]

    def __init__(self, config: MiniCPMVConfig, positions: str) -> None:
        super().__init__(config)
        if positions != "resampled":
            raise ValueError(f"the timm tower supports positions 'resampled' only, the family has {positions!r}")
        model = _timm_model(config)
        blocks = list(model.blocks)
        if config.read("drop_vision_last_layer", True):
            blocks = blocks[:-1]
        self.output_size = model.embed_dim
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.patch: int = model.patch_embed.patch_size[0]
        self.patch_embed = model.patch_embed
        conv = self.patch_embed.proj
        self.patch_embed.proj = PatchProjection(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None
        )
        self.pos_embed = model.pos_embed
        self.blocks = nn.ModuleList([TimmBlock(config, block) for block in blocks])
        self.norm = model.norm
        self._refuse_other_layers(model, len(blocks))
        self.post_init()

    def forward(self, patches: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """As in VisionTower."""
        pixels = normalize(patches, self.patch, self.pos_embed.dtype)
        x = self.patch_embed.proj(pixels).flatten(1) + resampled(self.pos_embed, sizes, self.grid)
        lengths = [height * width for height, width in sizes]
        for block in self.blocks:
            x = block(x, lengths)
        return self.norm(x)

    def get_input_embeddings(self) -> nn.Module:
        """The patch projection; adapters with reentrant checkpointing need its output to require a gradient."""
        return self.patch_embed.proj

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)
        if module is self:
            init.normal_(self.pos_embed, std=STD)

    def _refuse_other_layers(self, model: nn.Module, depth: int) -> None:
        unused = ("attn_pool.", f"blocks.{depth}.")
        theirs = {name for name, _ in model.named_parameters() if not name.startswith(unused)}
        if extra := sorted(theirs - {name for name, _ in self.named_parameters()}):
            raise ValueError(
                f"timm's {self.config.vision_encoder!r} has parameters that MiniCPM-V 2.0 does not have: "
                f"{', '.join(extra[:4])}{' ...' if len(extra) > 4 else ''}"
            )


def _timm_model(config: MiniCPMVConfig) -> Any:
    """The timm model that config.json names, with random weights; its sizes may be given in vision_encoder_kwargs."""
    import timm

    return timm.create_model(
        config.vision_encoder,
        pretrained=False,
        num_classes=0,
        dynamic_img_size=True,
        dynamic_img_pad=True,
        weight_init="skip",  # post_init initialises what no checkpoint has
        **config.read("vision_encoder_kwargs", {}),
    )
