"""Resamplers: cross attention from a fixed number of learned queries to the patch features of each visual item."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.initialization import STD
from finetune.models.positions import Sizes, sincos, sincos_times
from finetune.models.varlen_attention import split_attention

_HEAD_DIM = 128


class CrossAttention(nn.Module):
    """Multi-head attention with the parameter names of torch's MultiheadAttention.

    The fused projection is used only in the module that owns it, and ``out_proj`` is called as a module, as ZeRO-3,
    offloading and adapters require.
    """

    def __init__(self, config: MiniCPMVConfig, size: int) -> None:
        super().__init__()
        self.config, self.size = config, size
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size))
        self.out_proj = nn.Linear(size, size)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Cross attention of the same queries to the patches of every group.

        Args:
            query: (Q, E).
            key: (N, E).
            value: (N, E).
            lengths: rows of key and value that belong to each group of items.

        Returns:
            (groups, Q, E).
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (-1, _HEAD_DIM))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        groups, queries = len(lengths), len(query)
        q = q.repeat(groups, 1, 1)
        x = split_attention(q, k, v, [queries] * groups, lengths, self.config._attn_implementation)
        return self.out_proj(x.flatten(1)).unflatten(0, (groups, queries))


class Resampler(nn.Module):
    """Cross attention from learned queries to patch features plus two-dimensional sine-cosine positions."""

    temporal = False  # whether packed video frames have temporal positions

    def __init__(self, config: MiniCPMVConfig, input_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.size, self.queries = size, config.read("query_num", 64)
        self.query = nn.Parameter(torch.empty(self.queries, size))
        self.kv_proj = nn.Linear(input_size, size, bias=False)
        self.attn = CrossAttention(config, size)
        self.ln_q = nn.LayerNorm(size, eps=1e-6)
        self.ln_kv = nn.LayerNorm(size, eps=1e-6)
        self.ln_post = nn.LayerNorm(size, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(size, size))

    def forward(
        self, features: torch.Tensor, sizes: Sizes, times: Sequence[int], groups: Sequence[int]
    ) -> torch.Tensor:
        """Embeddings for the language model.

        Args:
            features: (N, D) vision features, items concatenated.
            sizes: rows and columns of patches per item.
            times: time index per item, -1 for stills.
            groups: number of consecutive items per group that share one block of queries; they sum to the items.

        Returns:
            (groups, Q, E).
        """
        features = features.to(self.query.dtype)  # a trained resampler may be float32 on a 16 bit tower
        value = self.ln_kv(self.kv_proj(features))
        # in place, into the positions: the sum takes no extra memory
        key = self._positions(sizes, times, value.device).to(value.dtype).add_(value)
        patches = iter([height * width for height, width in sizes])
        x = self.attn(self._queries(), key, value, [sum(islice(patches, count)) for count in groups])
        return self.ln_post(x) @ self.proj

    def _positions(self, sizes: Sizes, times: Sequence[int], device: torch.device) -> torch.Tensor:
        return sincos(sizes, self.size, device)

    def _queries(self) -> torch.Tensor:
        return self.ln_q(self.query)

    def initialize(self) -> None:
        """Initialises the parameters of this module and of its attention."""
        init.trunc_normal_(self.query, std=STD)
        init.normal_(self.proj, std=self.size**-0.5)
        init.trunc_normal_(self.attn.in_proj_weight, std=STD)
        init.zeros_(self.attn.in_proj_bias)


class QueryPositionResampler(Resampler):
    """Adds position embeddings, stored in the checkpoint, to the queries (V-2.0).

    They are a square sine-cosine grid and are never trained.
    """

    def __init__(self, config: MiniCPMVConfig, input_size: int) -> None:
        super().__init__(config, input_size)
        self.pos_embed = nn.Parameter(torch.empty(self.queries, self.size), requires_grad=False)

    def _queries(self) -> torch.Tensor:
        return self.ln_q(self.query) + self.pos_embed

    def initialize(self) -> None:
        """Initialises the position embeddings as well."""
        super().initialize()
        side = round(self.queries**0.5)
        init.copy_(self.pos_embed, sincos([(side, side)], self.size, self.pos_embed.device))


class TemporalResampler(Resampler):
    """Adds one-dimensional sine-cosine positions of the time index of packed video frames (4.5)."""

    temporal = True

    def _positions(self, sizes: Sizes, times: Sequence[int], device: torch.device) -> torch.Tensor:
        positions = super()._positions(sizes, times, device)
        if max(times) < 0:
            return positions
        lengths = torch.tensor([height * width for height, width in sizes], device=device)
        moments = sincos_times(times, self.size).to(device)
        return positions + moments.repeat_interleave(lengths, dim=0, output_size=len(positions))


RESAMPLERS: dict[str, type[Resampler]] = {
    "plain": Resampler,
    "query_positions": QueryPositionResampler,
    "temporal": TemporalResampler,
}
