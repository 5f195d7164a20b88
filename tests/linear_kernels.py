"""What flash-linear-attention and causal-conv1d compute, token by token on a CPU, put where transformers looks."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(B, T, heads, V); with ``cu_seqlens`` the state begins anew with every segment."""
    assert initial_state is None
    assert not output_final_state
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    starts = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    state, outputs = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[3]), []
    for token in range(q.shape[1]):
        if token in starts:
            state = torch.zeros_like(state)
        state = state * g[:, token, :, None, None].exp()
        known = (state * k[:, token, ..., None]).sum(-2)
        new = (v[:, token] - known) * beta[:, token, :, None]
        state = state + k[:, token, ..., None] * new[..., None, :]
        outputs.append((state * q[:, token, ..., None]).sum(-2) * (scale or q.shape[-1] ** -0.5))
    return torch.stack(outputs, dim=1), None


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """(B, channels, T); with ``seq_idx`` (B, T) int32 a token sees those of its own segment alone."""
    assert bias is None
    assert activation == "silu"
    owners = torch.zeros(x.shape[0], x.shape[2], dtype=torch.int32) if seq_idx is None else seq_idx
    assert owners.dtype == torch.int32
    assert owners.shape == (x.shape[0], x.shape[2])
    total, width = torch.zeros_like(x), weight.shape[1]
    for back in range(width):
        seen = F.pad(x, (back, 0))[:, :, : x.shape[2]]
        same = F.pad(owners, (back, 0), value=-1)[:, : x.shape[2]] == owners
        total = total + weight[:, width - 1 - back, None] * seen * same[:, None]
    return F.silu(total)


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if both packages were installed: transformers decides when its module is read, so it decides again."""
    conv, fla, ops, rule = (ModuleType(name) for name in ("causal_conv1d", "fla", "ops", "gated_delta_rule"))
    fla.ops, ops.gated_delta_rule = ops, rule  # pyright: ignore[reportAttributeAccessIssue]
    rule.chunk_gated_delta_rule = chunk_gated_delta_rule  # pyright: ignore[reportAttributeAccessIssue]
    conv.causal_conv1d_fn = causal_conv1d_fn  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "fla", fla)
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    for name, function, package in (
        ("torch_chunk_gated_delta_rule", "chunk_gated_delta_rule", "fla"),
        ("causal_conv1d_fn", "causal_conv1d_fn", "causal_conv1d"),
    ):
        plain = getattr(modeling_qwen3_5, name)
        chosen = use_kernel_func_from_hub_with_fallback(function, package)(plain)
        monkeypatch.setattr(modeling_qwen3_5, name, chosen)
