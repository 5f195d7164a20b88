"""Activation memory per block, traced on the meta device.

torch's saved_tensors_hooks report every tensor that the backward pass will need; on the meta device nothing is
computed, so a model of eight billion parameters takes a second. Attention is counted as SDPA and FlashAttention kernels
store it: inputs, output and one number per row and head, no matrix of T x T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.models.resampler import Resampler
from finetune.planning.alike_layers import shared
from finetune.planning.traced_block import TracedBlock

RECOMPUTED = (GradientCheckpointingLayer, Resampler)
"""Modules that gradient checkpointing recomputes."""


class _Flash(torch.autograd.Function):
    """Stand-in for attention with the saved tensors of memory-efficient kernels."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows, *([] if bias is None else [bias]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pragma: no cover - no backward pass here
        raise NotImplementedError


class _Grouped(torch.autograd.Function):
    """Stand-in for grouped matrix products in any dtype; the meta device supports 16 bit only."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        needed = [x for x, other in ((matrices, 0), (rows, 1)) if ctx.needs_input_grad[other]]
        ctx.save_for_backward(*needed, ends)
        return rows.new_empty(len(rows), matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pragma: no cover - no backward pass here
        raise NotImplementedError


class _Dropped(torch.autograd.Function):
    """Stand-in for dropout on a GPU, which saves one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pragma: no cover - no backward pass here
        raise NotImplementedError


@dataclass(slots=True)
class Trace:
    """The blocks of a forward pass, in order."""

    blocks: list[TracedBlock] = field(default_factory=list)
    current: TracedBlock = field(default_factory=lambda: TracedBlock("none"))
    seen: dict[int, Any] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)
    copies: dict[int, Any] = field(default_factory=dict)

    def begin(self, part: str, *, layer: bool = False) -> None:
        """Begins a new block."""
        self.current = TracedBlock(part, layer=layer)
        self.blocks.append(self.current)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor that is saved for the backward pass; storages are counted once, weights never."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen and id(storage) not in self.weights:
            self.seen[id(storage)] = storage  # kept alive: the id of a freed storage could be reused
            self.current.saved += storage.nbytes()
            if id(storage) in self.copies:
                self.current.copies += storage.nbytes()
        return tensor


class _StandIns(TorchFunctionMode):
    """Replaces functions that cannot run on the meta device, and records the largest tensors."""

    def __init__(self, trace: Trace, *, padded: bool, gpu: bool, autocast: bool) -> None:
        super().__init__()
        self.trace, self.padded, self.gpu, self.autocast = trace, padded, gpu, autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs one function of torch, or its stand-in."""
        given = dict(kwargs or {})
        if self.autocast:
            args = self._cast(func, args)
        result = self._stand_in(func, args, given)
        if result is NotImplemented:
            result = func(*args, **given)
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            own = id(result.untyped_storage())
            if own not in self.trace.weights:
                self.trace.current.widest = max(self.trace.current.widest, result.numel() * result.element_size())
        return result

    def _stand_in(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        first: Any = args[0] if args else None
        if func is F.scaled_dot_product_attention:
            bias = given.get("attn_mask")
            if bias is not None:  # kernels convert a boolean mask to an additive one, once per layer
                bias = torch.empty(bias.shape, dtype=first.dtype, device="meta")
            return _Flash.apply(*args[:3], bias)
        if getattr(func, "__name__", "").endswith(_GROUPED):
            return _Grouped.apply(first, args[1], given["offs"])
        if func is F.dropout and self.gpu and given.get("training", True) and given.get("p", 0):
            return _Dropped.apply(first)
        if func in (torch.Tensor.item, torch.Tensor.__bool__) and first.device.type == "meta":
            return not self.padded  # the only value that is read: whether there is no padding
        if func is torch.Tensor.to and first.device.type == "cpu" and not first.is_floating_point():
            dtype = next((arg for arg in (*args[1:], *given.values()) if isinstance(arg, torch.dtype)), first.dtype)
            return first if dtype == first.dtype else first.type(dtype)  # tensors of sizes stay on the CPU
        return NotImplemented

    def _cast(self, func: Any, args: Any) -> Any:
        """The inputs of a function as autocast casts them."""
        if func in _LOW:
            return tuple(self._low(x) for x in args)
        if func in _HIGH and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            return (args[0].float(), *args[1:])
        return args

    def _low(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        low = x.to(torch.bfloat16)
        if id(x.untyped_storage()) in self.trace.weights:
            storage = low.untyped_storage()
            self.trace.copies[id(storage)] = storage
        return low


# Name of F.grouped_mm in TorchFunctionMode; autocast does not cast its inputs.
_GROUPED = "grouped_mm"
_LOW = {F.linear, F.conv1d, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm}
_LOW |= {F.scaled_dot_product_attention}
_HIGH = {F.layer_norm, torch.Tensor.pow, torch.pow, torch.rsqrt, F.softmax, F.cross_entropy}


class _Sum(nn.Module):
    """Parametrization that adds the adapter to a parameter: for every expert, or for one matrix."""

    def __init__(self, wrapper: ParamWrapper) -> None:
        super().__init__()
        sides: Any = [*wrapper.lora_A.values(), *wrapper.lora_B.values()]
        self.sides: list[nn.Parameter] = [side.weight for side in sides]

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """The sum, in the dtype of the parameter."""
        count = len(base) if base.ndim == 3 else 1
        a, b = (side.to(base.dtype) for side in self.sides)
        a, b = a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count).permute(2, 0, 1)
        return torch.baddbmm(base, b, a) if base.ndim == 3 else base + (b @ a)[0]


@contextmanager
def _adapters_added(model: nn.Module) -> Iterator[None]:
    """Adds adapters on parameters as peft does; peft's own code needs autocast, which the meta device does not have."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    for wrapper in wrappers:
        parametrize.register_parametrization(
            wrapper.get_base_layer(), wrapper.parameter_name, _Sum(wrapper), unsafe=True
        )
        wrapper.merged_adapters.extend(wrapper.active_adapters)  # so that peft does not add them too
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.merged_adapters.clear()
            parametrize.remove_parametrizations(
                wrapper.get_base_layer(), wrapper.parameter_name, leave_parametrized=False
            )


@contextmanager
def tracing(
    model: nn.Module, part_of: Callable[[str], str], *, padded: bool, gpu: bool, autocast: bool
) -> Iterator[Trace]:
    """Records the activation memory of forward passes inside the context.

    Args:
        model: on the meta device, in training mode.
        part_of: the part that a module name belongs to.
        padded: whether rows have different lengths, so that attention needs a mask.
        gpu: whether to model GPU kernels instead of CPU kernels.
        autocast: whether trained weights are fp32 and matrix products 16 bit, as without DeepSpeed.
    """
    trace = Trace()
    for tensor in (*model.parameters(), *model.buffers()):
        trace.weights[id(tensor.untyped_storage())] = tensor.untyped_storage()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, RECOMPUTED):
            handles += _watch(trace, module, part_of(name))
    try:
        stand_ins = _StandIns(trace, padded=padded, gpu=gpu, autocast=autocast)
        hooks = torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda tensor: tensor)
        with _adapters_added(model), shared(model, lambda: trace.current), stand_ins, hooks:
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def _watch(trace: Trace, module: nn.Module, part: str) -> list[Any]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        trace.begin(part, layer=True)
        trace.current.entering = hidden.numel() * hidden.element_size()
        trained = [p.numel() * p.element_size() for p in module.parameters() if p.requires_grad]
        trace.current.gradients, trace.current.largest = sum(trained), max(trained, default=0)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        trace.current.graph = hidden.requires_grad
        trace.begin(part)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
