"""Traces the forward pass of a training step on the meta device, module by module in the order of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from finetune.families.family import Family
from finetune.models.adapters import base_model_of
from finetune.models.language_model import logits_scaling
from finetune.models.lm_head_loss import LMHeadLoss, nll_of, rows_at_once
from finetune.models.minicpmv4_6 import NativeModelMixin
from finetune.planning.activation_trace import RECOMPUTED, tracing
from finetune.planning.traced_block import TracedBlock
from finetune.planning.training_setup import SampleShape
from finetune.training.freezing import part_of

LM_HEAD = "head"


def blocks_of_step(
    model: Any, family: Family, shape: SampleShape, *, autocast: bool, gpu: bool = True
) -> list[TracedBlock]:
    """The blocks of the forward pass of one micro-batch: vision, resampler, LLM, head (logits and loss).

    Args:
        model: from ``meta_model.prepare_meta_model``.
        family: its generation.
        shape: of the micro-batch.
        autocast: whether matrix products are 16 bit while trained weights are fp32.
        gpu: whether to model GPU kernels instead of CPU kernels.
    """

    def part(name: str) -> str:
        return part_of(f"{name}.weight", family.parts)

    base_model: Any = base_model_of(model)
    with tracing(model, part, padded=shape.batch > 1, gpu=gpu, autocast=autocast) as trace:
        handles = [
            base_model.get_submodule(module).register_forward_pre_hook(lambda *_, name=name: trace.begin(name))
            for name in ("vision", "resampler")
            for module in family.parts[name]
        ]
        # Native classes encode images before they embed text, ours after it.
        features = _features(base_model, shape) if shape.items and isinstance(base_model, NativeModelMixin) else None
        trace.begin("llm")
        embedded = _embedded(base_model, shape)
        features = _features(base_model, shape) if shape.items and features is None else features
        for handle in handles:
            handle.remove()
        trace.begin("llm")
        hidden = _language(base_model, shape, embedded, features)
        trace.begin(LM_HEAD)
        _loss(base_model, hidden, shape)
        output: Any = base_model.get_output_embeddings()
        if isinstance(output, LMHeadLoss):
            trace.current.widest = _widest_in_head(output.weight, _labels(shape), autocast=autocast)
    _share_gradients(base_model, family.parts, trace.blocks)
    for block in trace.blocks:
        block.graph = block.graph or block.saved > 0 or block.gradients > 0
    return trace.blocks


def _features(base_model: Any, shape: SampleShape) -> torch.Tensor:
    side = max(round(shape.patches**0.5) // 4 * 4, 4)
    sizes = torch.tensor([(side, max(round(shape.patches / side) // 4 * 4, 4))] * (shape.batch * shape.items))
    count = int((sizes[:, 0] * sizes[:, 1]).sum())
    if isinstance(base_model, NativeModelMixin):
        patch = base_model.model.vision_tower.embeddings.patch_size
        pixels = torch.empty(1, 3, patch, count * patch, device="meta")
        return torch.cat(base_model.visual_features(pixels, sizes, base_model.config.downsample_mode, in_step=True))
    patches = torch.empty(count, base_model.patch_width, dtype=torch.uint8, device="meta")
    return base_model.get_image_features(patches, sizes)


def _embedded(base_model: Any, shape: SampleShape) -> torch.Tensor:
    ids = torch.empty(shape.batch, shape.tokens, dtype=torch.int64, device="meta")
    return base_model.get_input_embeddings()(ids)


def _language(
    base_model: Any, shape: SampleShape, embedded: torch.Tensor, features: torch.Tensor | None
) -> torch.Tensor:
    if features is not None:
        embedded = embedded + features.to(embedded.dtype).mean() * 0  # connects the graphs for the backward pass
    decoder = base_model.model.language_model if isinstance(base_model, NativeModelMixin) else base_model.llm.model
    mask = torch.ones(shape.batch, shape.tokens, dtype=torch.int64, device="meta")
    return decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state


def _labels(shape: SampleShape) -> int:
    return max(round(shape.batch * shape.tokens * shape.labelled), 1)


def _loss(base_model: Any, hidden: torch.Tensor, shape: SampleShape) -> torch.Tensor:
    where = torch.empty(_labels(shape), dtype=torch.int64, device="meta")
    chosen = hidden.flatten(0, 1).index_select(0, where)
    scaling = 1.0 if isinstance(base_model, NativeModelMixin) else logits_scaling(base_model.llm)
    output: Any = base_model.get_output_embeddings()
    return nll_of(output, chosen, where, scaling)[0]


def _widest_in_head(weight: torch.Tensor, count: int, *, autocast: bool) -> int:
    """Half of the temporary bytes of a ``LMHeadLoss``: logits, log probabilities, gradient sums."""
    rows = rows_at_once(count, weight)
    summed = weight.requires_grad and (autocast or (weight.element_size() == 2 and count > rows))
    return 4 * len(weight) * min(rows, count) + (2 * weight.numel() if summed else 0)


def _share_gradients(base_model: Any, parts: Mapping[str, tuple[str, ...]], blocks: list[TracedBlock]) -> None:
    """Assigns gradients of parameters outside of layers to the first block of their part (lm_head's to LM_HEAD).

    Those of an unused part are assigned to the first block: training runs a dummy image through it.
    """
    inside = {
        id(parameter)
        for module in base_model.modules()
        if isinstance(module, RECOMPUTED)
        for parameter in module.parameters()
    }
    output: Any = base_model.get_output_embeddings()
    heads = {id(parameter) for parameter in output.parameters()}
    for name, parameter in base_model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            part = LM_HEAD if id(parameter) in heads else part_of(name, parts)
            size = parameter.numel() * parameter.element_size()
            block = next((block for block in blocks if block.part == part and not block.layer), blocks[0])
            block.gradients += size
            block.largest = max(block.largest, size)
