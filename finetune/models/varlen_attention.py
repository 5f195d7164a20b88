"""Variable-length attention: full attention inside each item of a concatenated sequence, none between items.

Linear layers and norms run once over all items; only attention separates them. So every rank calls every layer equally
often whatever its images are, as ZeRO-3 requires, and nothing is padded or masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

import torch
from torch.nn import functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]


def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    implementation: str | None,
) -> torch.Tensor:
    """Full attention inside each item, none between items.

    Args:
        query: (sum of query_lengths, heads, head_dim).
        key: (sum of key_lengths, heads, head_dim).
        value: like ``key``.
        query_lengths: rows of ``query`` that belong to each item.
        key_lengths: rows of ``key`` and ``value`` that belong to each item.
        implementation: ``eager``, ``flash_attention_2``; SDPA for any other name.

    Returns:
        (sum of query_lengths, heads, head_dim).
    """
    attend = _IMPLEMENTATIONS.get(implementation or "sdpa", _sdpa)
    return attend(query, key, value, query_lengths, key_lengths)


def _by_runs(batched: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Attend:
    """Applies a function of (items, heads, length, head_dim) to each run of consecutive items of equal lengths."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
    ) -> torch.Tensor:
        runs = [
            (sum(1 for _ in run), *lengths) for lengths, run in groupby(zip(query_lengths, key_lengths, strict=True))
        ]
        # split, not slices: the backward pass of every slice writes zeros for all the others
        queries = query.split([count * length for count, length, _ in runs])
        keys, values = (tensor.split([count * length for count, _, length in runs]) for tensor in (key, value))
        outputs = []
        for (count, q_length, k_length), q, k, v in zip(runs, queries, keys, values, strict=True):
            q = q.unflatten(0, (count, q_length)).transpose(1, 2)
            k, v = (tensor.unflatten(0, (count, k_length)).transpose(1, 2) for tensor in (k, v))
            outputs.append(batched(q, k, v).transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return attend


def _eager_batched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


_sdpa = _by_runs(F.scaled_dot_product_attention)
_eager = _by_runs(_eager_batched)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> torch.Tensor:
    """One variable-length kernel call for all items.

    Raises:
        ImportError: flash-attn is not installed (transformers says so earlier, when the model is built).
        ValueError: the tensors are not 16 bit.
    """
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash_attention_2 works on float16 and bfloat16, the vision part runs in {query.dtype}: load with "
            "dtype=torch.bfloat16, train with --bf16 true, or use --attn_implementation sdpa"
        )
    q_offsets = torch.tensor([0, *accumulate(query_lengths)], dtype=torch.int32, device=query.device)
    k_offsets = torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32, device=query.device)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=q_offsets,
        cu_seqlens_k=k_offsets,
        max_seqlen_q=max(query_lengths),
        max_seqlen_k=max(key_lengths),
    )


_IMPLEMENTATIONS: dict[str, Attend] = {"sdpa": _sdpa, "eager": _eager, "flash_attention_2": _flash}
