"""Attention for packed rows: causal attention inside each segment of one row, none between segments.

Registered with transformers as "sdpa_segmented". With segment lengths it calls torch's SDPA per segment, without a mask
of T x T; without them it is the "sdpa" of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTED = "sdpa_segmented"
LENGTHS = "segment_lengths"


def implementation_of(requested: str | None) -> str | None:
    """The attention implementation of the language model: "sdpa_segmented" for "sdpa", others unchanged."""
    return SEGMENTED if requested == "sdpa" else requested


def segmented_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature of transformers' AttentionInterface.

    Args:
        module: the layer; ``num_key_value_groups`` is read.
        query: (B, heads, T, head_dim).
        key: (B, key heads, T, head_dim).
        value: like ``key``.
        attention_mask: from the mask function below; ignored with ``segment_lengths``.
        dropout: dropout probability.
        scaling: factor on the scores.
        segment_lengths: tokens of each segment, adding up to T; None for rows that are not packed.
        **kwargs: passed to the attention of transformers.

    Returns:
        (B, T, heads, head_dim), and no weights.
    """
    if segment_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.shape[1] != key.shape[1]
    # split, not slices: the backward pass of a slice writes a full row of zeros, that of a split is one copy
    parts = (tensor.split(segment_lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


AttentionInterface.register(SEGMENTED, segmented_attention)
AttentionMaskInterface.register(SEGMENTED, sdpa_mask)


def segment_ids(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """Segment index of every token of a packed row, as causal-conv1d takes it (seq_idx).

    Args:
        bounds: cu_seq_lens_q, (s + 1,).
        length: tokens of the row, T.

    Returns:
        (1, T) int32.
    """
    counts = torch.arange(len(bounds) - 1, dtype=torch.int32, device=bounds.device)
    return counts.repeat_interleave(bounds.diff().long(), output_size=length)[None]


def packed_arguments(
    llm: Any,
    bounds: torch.Tensor,
    embeddings: torch.Tensor,
    position_ids: torch.Tensor | None,
    *,
    past: Mapping[str, Cache | None],
    attention_mask: torch.Tensor | None,
    use_cache: bool | None,
) -> dict[str, Any]:
    """Arguments of a language model for a packed row, in addition to the four kwargs of FlashAttention.

    FlashAttention reads cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k. "eager" and the "sdpa" of
    transformers derive the segments from the positions, and only without a mask and without a cache.

    Args:
        llm: the language model.
        bounds: cu_seq_lens_q, (s + 1,).
        embeddings: (1, T, E).
        position_ids: (1, T), restarting at 0 with every segment.
        past: a cache of earlier steps by its name; must be None.
        attention_mask: must be None.
        use_cache: must be off.

    Raises:
        ValueError: an argument with which segments would attend to each other.
    """
    for name, refused in (
        ("an attention_mask", attention_mask is not None),
        ("use_cache=True", bool(use_cache)),
        *((name, cache is not None) for name, cache in past.items()),
        (f"{len(embeddings)} rows", len(embeddings) != 1),
        ("no position_ids", position_ids is None),
    ):
        if refused:
            raise ValueError(
                f"cu_seq_lens_q (packed segments) given with {name}: a packed batch is one row with position_ids that "
                "restart, no mask and no cache; else its segments would attend to each other"
            )
    arguments: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    sliding = any("sliding" in kind for kind in getattr(llm.config, "layer_types", None) or ())
    if llm.config._attn_implementation != SEGMENTED or sliding:
        return arguments
    ends, length = bounds.tolist(), embeddings.shape[1]  # once per forward pass: this synchronises a GPU
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(f"cu_seq_lens_q goes from {ends[0]} to {ends[-1]}, but the row has {length} tokens")
    # transformers uses a 4-D mask as it is, and builds none
    arguments["attention_mask"] = embeddings.new_empty(1, 1, 0, 0)
    arguments[LENGTHS] = tuple(end - start for start, end in zip(ends, ends[1:], strict=False))
    return arguments
