"""FLOPs of a training step, computed from the sizes of its micro-batches.

The cost model. A matrix of m x n applied to k vectors costs 2 m n k in the forward pass, as much in the backward pass
for the gradient of its input, if one is needed, and as much for the gradient of its weights, if they train. Attention
costs 4 x width per query-key pair (two products), and twice that in the backward pass if a gradient passes through. So
a trained part costs three times its forward pass, a frozen LLM with adapters about twice, a frozen tower in front once.
In causal attention a segment of L tokens has L^2 / 2 pairs. The gated delta rule of linear attention is counted as its
recurrence: 6 operations per element of its state and token. In a mixture of experts only the experts that a token is
routed to, the shared expert and the router count; adapters on experts likewise, though peft adds theirs to the weights
of all experts, once per micro-batch.

These are the FLOPs of the model (as in MFU), without padding, recomputation (gradient checkpointing), logits of tokens
without a label, dummy images, norms, activations and the optimizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from finetune.families.family import Family
from finetune.models.adapters import base_model_of
from finetune.models.experts import Experts, Router, expert_matrices, routed_shares
from finetune.models.minicpmv4_6 import NativeModelMixin
from finetune.models.resampler import CrossAttention, Resampler

COUNTS: tuple[str, ...] = (
    "samples",
    "tokens",
    "pairs",
    "labelled",
    "looks",
    "patches",
    "patch_pairs",
    "groups",
    "steps",
    "step_pairs",
)
"""The counts of a micro-batch that its FLOPs depend on.

samples; tokens of the LLM; pairs, the sum of the squared segment lengths; labelled tokens; looks, 1 if there are visual
items; patches; patch_pairs, the sum of the squared patch counts per item; groups of visual items, each with its
queries; steps of the audio tower; step_pairs, the pairs of steps that attend to each other.
"""

Count = int | torch.Tensor


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs per unit of each of COUNTS.

    Attributes:
        forward: FLOPs of the forward pass per unit.
        backward: FLOPs of the backward pass per unit.
        chunk: attention chunk of the audio tower, in steps: a step attends to its chunk and all before.
    """

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    chunk: int = 0

    def of(self, counts: Mapping[str, float]) -> float:
        """FLOPs of forward and backward pass together."""
        return sum((self.forward.get(name, 0) + self.backward.get(name, 0)) * counts[name] for name in counts)

    def counts(self, inputs: Mapping[str, Any]) -> dict[str, Count]:
        """COUNTS of a micro-batch; tensors where the batch is on a device already.

        Args:
            inputs: padded, with attention_mask (B, T), or packed, with cu_seq_lens_q (s + 1,); "sources" is one name
                per sample.
        """
        rows = len(inputs["input_ids"])
        if (bounds := inputs.get("cu_seq_lens_q")) is not None:
            lengths, rows = bounds.diff(), len(bounds) - 1
        else:
            lengths = inputs["attention_mask"].sum(1)
        sizes = [size for name in _SIZES if (size := inputs.get(name)) is not None and len(size)]
        patches = torch.cat(sizes).long().prod(1) if sizes else None
        groups = inputs.get("image_bound")
        found: dict[str, Count] = {
            "samples": len(inputs["sources"]) if "sources" in inputs else rows,
            "tokens": _sum(lengths),
            "pairs": _sum(lengths.long().square()),
            "labelled": _sum(inputs["labels"] >= 0),
            "looks": int(patches is not None),
            "patches": 0 if patches is None else _sum(patches),
            "patch_pairs": 0 if patches is None else _sum(patches.square()),
            "groups": 0 if groups is None else len(groups) // inputs.get("media_copies", 1),
        }
        return found | self._audio_counts(inputs.get("audio_lengths"))

    def _audio_counts(self, frames: torch.Tensor | None) -> dict[str, Count]:
        if frames is None:
            return {"steps": 0, "step_pairs": 0}
        steps = (frames.long() + 1) // 2
        full = steps // self.chunk if self.chunk else torch.zeros_like(steps)
        pairs = self.chunk**2 * full * (full + 1) // 2 + (steps - full * self.chunk) * steps
        return {"steps": _sum(steps), "step_pairs": _sum(pairs)}


_SIZES = ("tgt_sizes", "target_sizes", "target_sizes_videos")


def _sum(values: torch.Tensor) -> Count:
    total = values.sum()
    return int(total) if total.device.type == "cpu" else total


def flops_of(model: Any, family: Family) -> Flops:
    """FLOPs per unit of each count, with the current adapters and frozen parts."""
    base_model = base_model_of(model)
    rules, routed, chunk = _rules(base_model), routed_shares(base_model), 0
    forward, backward = dict.fromkeys(COUNTS, 0.0), dict.fromkeys(COUNTS, 0.0)
    passes: dict[str, bool] = {}
    for part in ("vision", "resampler", "audio", "llm"):
        # Whether the gradient of the part's input is needed: does something in front of it train?
        passing = passes.get("vision", False) if part == "resampler" else part == "llm" and any(passes.values())
        for root in family.parts.get(part, ()):
            for name, module in _inside(base_model.get_submodule(root), root):
                for count, cost, weight in _costs(name, module, rules, routed):
                    forward[count] += cost
                    if weight is None:
                        backward[count] += 2 * cost * passing
                    else:
                        backward[count] += cost * (passing + weight.requires_grad)
                passing |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        passes[part] = passing
    if "audio" in family.parts:
        chunk = base_model.apm.chunk
    return Flops(forward, backward, chunk)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How often the matrices of some modules are applied, and how many pairs their attention has.

    Attributes:
        where: regular expression for the module names, matched from the start.
        count: the count that the number of vectors is proportional to.
        share: vectors per unit of ``count``.
        attention: for the output projection of an attention: the count that its pairs are proportional to.
        attended: pairs per unit of ``attention``.
    """

    where: str
    count: str
    share: float = 1.0
    attention: str = ""
    attended: float = 1.0


def _rules(base_model: Any) -> tuple[_Rule, ...]:
    return _native_rules(base_model) if isinstance(base_model, NativeModelMixin) else _own_rules(base_model)


def _own_rules(base_model: Any) -> tuple[_Rule, ...]:
    queries = base_model.query_num
    return (
        _Rule(r"llm\.lm_head", "labelled"),
        _Rule(r"llm\..*\.self_attn\.o_proj$", "tokens", 1, "pairs", 0.5),
        _Rule(r"llm\.", "tokens"),
        _Rule(r"vpm\..*\.(self_attn\.out_proj|attn\.proj)$", "patches", 1, "patch_pairs"),
        _Rule(r"vpm\.", "patches"),
        _Rule(r"resampler\.kv_proj", "patches"),
        _Rule(r"resampler\.attn\.out_proj$", "groups", queries, "patches", queries),
        _Rule(r"resampler\.attn$", "patches", 2),  # keys and values
        _Rule(r"resampler", "groups", queries),
        _Rule(r"apm\.conv1", "steps", 2),
        _Rule(r"apm\..*\.self_attn\.out_proj$", "steps", 1, "step_pairs"),
        _Rule(r"(apm|audio_projection_layer)\.", "steps"),
    )


def _native_rules(base_model: Any) -> tuple[_Rule, ...]:
    """Rules of 4.6 and later, whose tower merges patches by windows after one of its layers ("16x") or not ("4x")."""
    config = base_model.config
    vision, text = config.vision_config, config.text_config
    merging = config.downsample_mode != "4x"
    window = math.prod(vision.window_kernel_size) if merging else 1
    before = "|".join(str(layer) for layer in range(config.insert_layer_id + 1)) if merging else r"\d+"
    tower, end = r"model\.vision_tower\.", r"self_attn\.out_proj$"
    kernel = math.prod(config.merge_kernel_size)
    merger = [
        _Rule(rf"model\.merger\.mlp\.{index}\.", "patches", (1 / window / kernel ** (index + 1)))
        for index in range(config.merger_times)
    ]
    unused = () if merging else (_Rule(tower + "vit_merger", "patches", 0),)
    return (
        *unused,
        _Rule("lm_head", "labelled"),
        _Rule(r"model\.language_model\..*\.self_attn\.o_proj$", "tokens", 1, "pairs", 0.5),
        _Rule(
            r"model\.language_model\..*\.linear_attn\.out_proj$", "tokens", 1, "tokens", 1.5 * text.linear_key_head_dim
        ),
        _Rule(r"model\.language_model\.", "tokens"),
        _Rule(tower + "vit_merger." + end, "patches", 1, "patches", window),
        _Rule(tower + r"vit_merger\.self_attn", "patches"),
        _Rule(tower + "vit_merger", "patches", 1 / window),
        _Rule(tower + rf"encoder\.layers\.({before})\." + end, "patches", 1, "patch_pairs"),
        _Rule(tower + rf"(embeddings|encoder\.layers\.({before})\.)", "patches"),
        _Rule(tower + r"encoder\.layers\.\d+\." + end, "patches", 1 / window, "patch_pairs", 1 / window**2),
        _Rule(tower, "patches", 1 / window),
        *merger,
        _Rule(r"model\.merger", "patches", 0),
    )


def _inside(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules, inner ones first, without the original modules that peft keeps."""
    for child, below in module.named_children():
        if child != "original_module":
            yield from _inside(below, f"{name}.{child}")
    yield re.sub(r"\.base_layer$|\.modules_to_save\.[^.]+", "", name), module


def _costs(
    name: str, module: nn.Module, rules: tuple[_Rule, ...], routed: Mapping[int, Fraction]
) -> Iterator[tuple[str, float, torch.Tensor | None]]:
    """Forward costs of a module: count, FLOPs per unit, and the weight; None for attention, which has no weight."""
    for weight, size in _matrices(module):
        rule = next(rule for rule in rules if re.match(rule.where, name))
        yield rule.count, 2 * size * rule.share * float(routed.get(id(weight), 1)), weight
        if isinstance(module, Resampler):  # its queries are projected once for all items
            yield "looks", 2 * size * module.queries, module.attn.in_proj_weight
        if rule.attention and isinstance(module, nn.Linear):
            yield rule.attention, 4 * module.in_features * rule.attended, None


def _matrices(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """The weights of a module and the sizes of their matrices, which sharded (ZeRO-3) or 4 bit tensors do not have."""
    if isinstance(module, nn.Linear):
        return [(module.weight, module.in_features * module.out_features)]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        inputs = module.in_channels // module.groups
        return [(module.weight, module.out_channels * inputs * math.prod(module.kernel_size))]
    if isinstance(module, CrossAttention):
        return [(module.in_proj_weight, module.size**2)]
    if isinstance(module, Resampler):
        return [(module.proj, module.size**2)]
    if isinstance(module, Router):
        return [(module.weight, module.num_experts * module.hidden_dim)]
    return [*expert_matrices(module)] if isinstance(module, Experts) else []
