"""Floating point operations of a training step, from the sizes of its micro-batches alone: nothing is measured.

The cost model. A matrix of m x n that k vectors go through costs 2 m n k forward; as much again backward for its input
if a gradient passes through, and as much again for its weights if they train. Attention costs 4 x width per pair of a
query and a key that it sees (two products), and twice that backward if a gradient passes through. So what trains costs
three times its forward pass, a frozen LLM with adapters about twice, a frozen tower in front once. In causal attention
a segment of L tokens has L^2 / 2 pairs. The gated delta rule of linear attention counts as its recurrence does: 6
operations per number of its state and token. Of a mixture only the experts that a token is sent to count, the shared
one and the router; adapters on experts likewise, though peft adds theirs to the weights of all, once per micro-batch.

Counted is what the result needs: no padding, no layers run again (activation checkpointing), no logits where there is
no label, none of the pictures that stand in for missing ones; norms, activations and the optimizer are left out too.
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
from finetune.models.adapters import network_of
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
"""What is counted of a micro-batch.

Samples; tokens of the LLM and the sum of the squares of its segments' lengths; tokens with a label; 1 if there are
visual items; patches, and the sum of the squares of the items' patches; groups of visual items, each with its queries;
steps of the audio tower and the pairs that see each other.
"""

Count = int | torch.Tensor


@dataclass(frozen=True, slots=True)
class Flops:
    """What one of each of COUNTS costs.

    Attributes:
        forward: operations of the forward pass per unit.
        backward: those of the backward pass.
        chunk: steps of sound that see each other and all before them.
    """

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    chunk: int = 0

    def of(self, counts: Mapping[str, float]) -> float:
        """Operations of forward and backward pass together."""
        return sum((self.forward.get(name, 0) + self.backward.get(name, 0)) * counts[name] for name in counts)

    def counts(self, inputs: Mapping[str, Any]) -> dict[str, Count]:
        """COUNTS of a micro-batch, as the network gets it; a tensor where the batch is on a device already.

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
            "groups": 0 if groups is None else len(groups),
        }
        return found | self._heard(inputs.get("audio_lengths"))

    def _heard(self, frames: torch.Tensor | None) -> dict[str, Count]:
        if frames is None:
            return {"steps": 0, "step_pairs": 0}
        steps = (frames.long() + 1) // 2
        whole = steps // self.chunk if self.chunk else torch.zeros_like(steps)
        pairs = self.chunk**2 * whole * (whole + 1) // 2 + (steps - whole * self.chunk) * steps
        return {"steps": _sum(steps), "step_pairs": _sum(pairs)}


_SIZES = ("tgt_sizes", "target_sizes", "target_sizes_videos")


def _sum(values: torch.Tensor) -> Count:
    total = values.sum()
    return int(total) if total.device.type == "cpu" else total


def flops_of(model: Any, family: Family) -> Flops:
    """What a unit of each count costs the model as it is trained now, adapters and frozen parts included."""
    network = network_of(model)
    rules, routed, chunk = _rules(network), routed_shares(network), 0
    forward, backward = dict.fromkeys(COUNTS, 0.0), dict.fromkeys(COUNTS, 0.0)
    passes: dict[str, bool] = {}
    for part in ("vision", "resampler", "audio", "llm"):
        # Whether a gradient is wanted at the entrance of the part: does something in front of it train?
        passing = passes.get("vision", False) if part == "resampler" else part == "llm" and any(passes.values())
        for root in family.parts.get(part, ()):
            for name, module in _inside(network.get_submodule(root), root):
                for count, cost, weight in _costs(name, module, rules, routed):
                    forward[count] += cost
                    if weight is None:
                        backward[count] += 2 * cost * passing
                    else:
                        backward[count] += cost * (passing + weight.requires_grad)
                passing |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        passes[part] = passing
    if "audio" in family.parts:
        chunk = network.apm.chunk
    return Flops(forward, backward, chunk)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What goes through the matrices of some modules, and what their attention sees.

    Attributes:
        where: regular expression on the names of the modules, matched from the start.
        count: of which there is ``share`` per vector.
        share: vectors per unit of ``count``.
        attention: the module is the last of an attention, whose pairs are ``attended`` per unit of this count.
        attended: see ``attention``.
    """

    where: str
    count: str
    share: float = 1.0
    attention: str = ""
    attended: float = 1.0


def _rules(network: Any) -> tuple[_Rule, ...]:
    return _whole_rules(network) if isinstance(network, NativeModelMixin) else _own_rules(network)


def _own_rules(network: Any) -> tuple[_Rule, ...]:
    queries = network.query_num
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


def _whole_rules(network: Any) -> tuple[_Rule, ...]:
    """Of 4.6 and later, whose tower merges patches by windows behind one of its layers ("16x") or not at all ("4x")."""
    config = network.config
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
    left_out = () if merging else (_Rule(tower + "vit_merger", "patches", 0),)
    return (
        *left_out,
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
    """A module and all below it in their order, the inner ones first, without the originals that peft keeps."""
    for child, below in module.named_children():
        if child != "original_module":
            yield from _inside(below, f"{name}.{child}")
    yield re.sub(r"\.base_layer$|\.modules_to_save\.[^.]+", "", name), module


def _costs(
    name: str, module: nn.Module, rules: tuple[_Rule, ...], routed: Mapping[int, Fraction]
) -> Iterator[tuple[str, float, torch.Tensor | None]]:
    """What a module costs forward: count, operations per unit, and the weights; None for attention, which has none."""
    for weight, size in _matrices(module):
        rule = next(rule for rule in rules if re.match(rule.where, name))
        yield rule.count, 2 * size * rule.share * float(routed.get(id(weight), 1)), weight
        if isinstance(module, Resampler):  # its queries are projected once for all items
            yield "looks", 2 * size * module.queries, module.attn.in_proj_weight
        if rule.attention and isinstance(module, nn.Linear):
            yield rule.attention, 4 * module.in_features * rule.attended, None


def _matrices(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """The weights of a module and the sizes of their matrices, which neither ZeRO-3 nor 4 bit tell."""
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
