"""Lean norms and MLPs: outputs and gradients of transformers' own to the bit, and fewer bytes saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from finetune.models.lean_layers import LeanMLP, LeanRMSNorm, put_lean_layers

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MODELS = {
    "granite": (GraniteForCausalLM, GraniteConfig),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


def saved_bytes(run: Any) -> int:
    """Bytes of all tensors that are saved while something runs, each memory once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def outcome(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, and gradients of the weights."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape).to(y.dtype))
    assert x.grad is not None
    return [y, x.grad, *(weight.grad.clone() for weight in module.parameters() if weight.grad is not None)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert torch.equal(our, their)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 37, 256), (1, 50, 8, 32), (0, 256)])
def test_norm(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(shape[-1], eps=1e-5).to(weight_dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (3 * torch.randn(shape)).to(dtype)
    assert_same(outcome(LeanRMSNorm(norm), x), outcome(norm, x))
    norm.requires_grad_(False)
    assert_same(outcome(LeanRMSNorm(norm), x), outcome(norm, x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    mlp = Qwen3MLP(Qwen3Config(**SIZES)).to(dtype)
    x = (3 * torch.randn(2, 37, 64)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same(outcome(LeanMLP(mlp), x), outcome(mlp, x))
        mlp.gate_proj.requires_grad_(False)
        assert_same(outcome(LeanMLP(mlp), x), outcome(mlp, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_language_models(name: str, dtype: torch.dtype) -> None:
    """Loss and gradients, names of weights and random weights are those of transformers, with less memory."""
    network, settings = MODELS[name]
    torch.manual_seed(0)
    theirs = network(settings(**SIZES)).to(dtype)
    torch.manual_seed(0)
    ours = network(settings(**SIZES)).to(dtype)
    put_lean_layers(ours)
    assert sum(isinstance(module, LeanMLP) for module in ours.modules()) == 2
    assert sum(isinstance(module, LeanRMSNorm) for module in ours.modules()) == (9 if name == "qwen3" else 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ids, found, sizes = torch.arange(48).view(2, 24), [], []
    for model in (ours, theirs):
        losses: list[Any] = []
        sizes.append(saved_bytes(lambda model=model, losses=losses: losses.append(model(ids, labels=ids).loss)))
        losses[0].backward()
        found.append([losses[0], *(weight.grad for weight in model.parameters())])
    assert_same(*found)
    assert sizes[0] < (0.85 if dtype == torch.bfloat16 else 0.99) * sizes[1]


def test_another_activation_stays() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    put_lean_layers(model)
    assert not any(isinstance(module, LeanMLP) for module in model.modules())


def test_a_second_backward_pass_is_refused() -> None:
    norm = LeanRMSNorm(Qwen3RMSNorm(8))
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
