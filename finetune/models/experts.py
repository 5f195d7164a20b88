"""Mixture of experts: names and sizes of the experts' weights, and the share of them that a token is routed to.

The experts of a layer are fused: their weights are 3-D parameters whose first dimension is the expert.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import nn
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeExperts as Experts,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeSparseMoeBlock as ExpertBlock,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeTopKRouter as Router,
)

__all__ = ["ExpertBlock", "Experts", "Router", "expert_matrices", "expert_names", "routed_shares"]


def routed_shares(model: nn.Module) -> dict[int, Fraction]:
    """Share of the experts that a token is routed to, by the id of a routed experts' parameter, with adapters on them.

    Empty for dense models.
    """
    shares: dict[int, Fraction] = {}
    for block in model.modules():
        if isinstance(block, ExpertBlock):
            router = next(module for module in block.gate.modules() if isinstance(module, Router))
            share = Fraction(router.top_k, router.num_experts)
            shares |= {id(parameter): share for parameter in block.experts.parameters()}
    return shares


def expert_matrices(experts: Experts) -> list[tuple[nn.Parameter, int]]:
    """The fused weights and their sizes, which partitioned parameters (ZeRO-3) do not have."""
    sizes: Any = experts
    one = int(sizes.num_experts * sizes.hidden_dim * sizes.intermediate_dim)
    return [(sizes.gate_up_proj, 2 * one), (sizes.down_proj, one)]


def expert_names(model: nn.Module) -> list[str]:
    """Names of the weights of experts and routers, which are not in linear layers."""
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, Experts | Router))
    return [f"{name}.{own}" for name, module in modules for own, _ in module.named_parameters(recurse=False)]
