"""RMSNorm and SwiGLU of the language models, with the same results and fewer tensors saved for the backward pass.

Autograd keeps a float32 copy of the 16 bit input of a norm, and the activated gate beside the gate. Here the inputs
alone are kept, and the rest is computed again in the backward pass: operations per element, which cost next to nothing
beside the matrix products. The gradients are computed in the order of autograd, and are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.granite.modeling_granite import GraniteMLP, GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

# They compute the same.
_NORMS = (GraniteRMSNorm, LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_MLPS = (GraniteMLP, LlamaMLP, Qwen2MLP, Qwen3MLP)


class _Norm(torch.autograd.Function):
    """The input, scaled to a mean square of 1 in float32, times the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = x.float()
        return weight * (wide * _inverse(wide, eps)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wide = x.float()
        inverse = _inverse(wide, ctx.eps)
        of_weight = of_x = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * (wide * inverse).to(x.dtype)).sum_to_size(weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            of_normed = (grad * weight).to(x.dtype).float()
            of_inverse = (of_normed * wide).sum_to_size(inverse.shape)
            of_mean = -0.5 * of_inverse * inverse.pow(3) / x.shape[-1]
            of_x = (of_normed.mul_(inverse) + of_mean * (2 * wide)).to(x.dtype)
        return of_x, of_weight, None


def _inverse(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root of the mean square of the last dimension, which stays with length 1."""
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class _Swiglu(torch.autograd.Function):
    """SiLU of the gate, times the other projection."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        of_gate = of_up = None
        if ctx.needs_input_grad[1]:
            of_up = (grad * F.silu(gate)).to(up.dtype)
        if ctx.needs_input_grad[0]:
            of_gate = torch.ops.aten.silu_backward((grad * up).to(gate.dtype), gate)
        return of_gate, of_up


class LeanRMSNorm(LlamaRMSNorm):
    """An RMSNorm that saves a 16 bit input as it is, and not in float32.

    Args:
        norm: the norm that it replaces; the parameter is shared.
    """

    def __init__(self, norm: Any) -> None:
        super(LlamaRMSNorm, self).__init__()  # LlamaRMSNorm's would make a new parameter
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., E) to (..., E)."""
        if hidden_states.dtype == torch.float32:  # no copy is made of it, and its gradients would be added differently
            return super().forward(hidden_states)
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # pyright: ignore[reportReturnType]


class LeanMLP(LlamaMLP):
    """An MLP with SiLU that saves gate and upper projection, and not the activated gate.

    Args:
        mlp: the MLP that it replaces; its layers are shared.
    """

    def __init__(self, mlp: Any) -> None:
        super(LlamaMLP, self).__init__()  # LlamaMLP's would make new layers
        self.config, self.hidden_size, self.intermediate_size = mlp.config, mlp.hidden_size, mlp.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., E) to (..., E)."""
        return self.down_proj(_Swiglu.apply(self.gate_proj(x), self.up_proj(x)))


def put_lean_layers(llm: nn.Module) -> None:
    """Replaces the norms and MLPs of a language model that the lean ones compute the same as."""
    for parent in list(llm.modules()):
        for name, module in list(parent.named_children()):
            if type(module) in _NORMS:
                setattr(parent, name, LeanRMSNorm(module))
            elif isinstance(module, _MLPS) and module.config.hidden_act == "silu":
                setattr(parent, name, LeanMLP(module))
