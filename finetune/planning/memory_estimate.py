"""Bytes on one GPU: what lies there all the time, and the highest point of a training step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from finetune.families import detect
from finetune.planning.activation_trace import TracedBlock
from finetune.planning.meta_model import build, prepared, quantised
from finetune.planning.meta_step import HEAD, blocks_of_step
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.training.freezing import numel

GIB = 2**30
# CUDA's context, the libraries' workspaces and NCCL's channels, and what torch's allocator cannot hand out again. Not
# measured here.
CONTEXT = int(1.0 * GIB)
SLACK = 0.03
# Of ds_config_zero2.json and ds_config_zero3.json, in elements.
_ZERO2_BUCKET = 200_000_000
_ZERO3_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000
# nf4 with double quantisation: 4 bit, 8 bit per 64 weights, 32 bit per 64 * 256.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_FP32, _ADAM = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one GPU at the highest point of a step.

    Attributes:
        weights: of the network, as they lie on the GPU.
        gradients: of what is trained.
        optimizer: Adam's two moments, and fp32 masters under DeepSpeed.
        activations: kept for the backward pass, and what is being worked on.
        logits: logits, loss and their gradients.
        buffers: of communication: ZeRO's buckets and gathered layers, DDP's buckets.
        context: of CUDA and of torch's allocator.
        host: in the memory of the machine for this process (offload), not part of the total.
        when: "loss", "forward", "backward" or "step", what is going on at that point.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    context: int = 0
    host: int = 0
    when: str = ""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, entry.name) for entry in fields(self) if entry.name not in ("host", "when"))


def plan(config: dict[str, Any], recipe: TrainingSetup, shape: SampleShape) -> MemoryEstimate:
    """Memory of one GPU.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
        ArgumentError: flags that contradict each other or the family.
    """
    return MemoryPlanner(config).memory(recipe, shape)


class MemoryPlanner:
    """Plans for one checkpoint; what recipes have in common is found once.

    Args:
        config: config.json as a dictionary.
        dtype: in which it computes.
        gpu: whether it is planned for a GPU; on a CPU there is no context and kernels keep other things.
        model: the network on the meta device as all recipes train it; None to make it as each of them says.
    """

    def __init__(
        self,
        config: dict[str, Any],
        dtype: torch.dtype = torch.bfloat16,
        *,
        gpu: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        self.config, self.dtype, self.gpu, self._given = config, dtype, gpu, model
        self.family = detect(config)
        self._models: dict[Any, nn.Module] = {}
        self._blocks: dict[Any, list[TracedBlock]] = {}

    def model(self, recipe: TrainingSetup) -> nn.Module:
        """The network on the meta device as the recipe trains it."""
        if self._given is not None:
            return self._given
        alike = replace(recipe, stage=min(recipe.stage, 1), offload=False, gpus=1, vision_batch=None)
        alike = replace(alike, checkpointing=False, checkpoint_parts=None)
        alike = replace(alike, method="lora" if recipe.adapters else recipe.method)
        if alike not in self._models:
            self._models[alike] = prepared(self.config, alike, self.dtype)
        return self._models[alike]

    def blocks(self, recipe: TrainingSetup, shape: SampleShape) -> list[TracedBlock]:
        """What the forward pass keeps, in its order."""
        model, autocast = self.model(recipe), not recipe.masters and self.dtype != torch.float32
        key = (id(model), shape)
        if key not in self._blocks:
            self._blocks[key] = blocks_of_step(model, self.family, shape, autocast=autocast, gpu=self.gpu)
        return self._blocks[key]

    def parameters(self) -> int:
        """Number of parameters of the checkpoint, without adapters."""
        return numel_total(build(self.config))

    def memory(self, recipe: TrainingSetup, shape: SampleShape) -> MemoryEstimate:
        """Memory of one GPU.

        Raises:
            ArgumentError: flags that contradict each other or the family.
        """
        resting = self.resting(recipe)
        blocks = [_in_pieces(block, recipe, shape) for block in self.blocks(recipe, shape)]
        peak = max((*_moments(blocks, recipe, resting), self._in_step(recipe, resting)), key=lambda m: m.total)
        if not self.gpu:
            return peak
        return replace(peak, context=CONTEXT + int(SLACK * peak.total))

    def resting(self, recipe: TrainingSetup) -> MemoryEstimate:
        """What lies on the GPU between two steps; the gradients as they are at the end of a step."""
        model = self.model(recipe)
        packed = quantised(model, self.config) if recipe.method == "qlora" else set()
        weights, trained = 0, 0
        for name, parameter in model.named_parameters():
            size = _NF4_BYTES if name in packed else parameter.element_size()
            weights += round(numel(parameter) * size)
            trained += numel(parameter) if parameter.requires_grad else 0
        size = self.dtype.itemsize if recipe.masters else _FP32
        return _shared_out(recipe, weights, trained, size, numel_total(model), self._hidden())

    def _hidden(self) -> int:
        return (self.config.get("text_config") or self.config)["hidden_size"]

    def _in_step(self, recipe: TrainingSetup, resting: MemoryEstimate) -> MemoryEstimate:
        """While the optimizer steps: DeepSpeed lays gradients in a row and makes them fp32, a group at a time."""
        extra = 0
        if recipe.masters and not recipe.offload:
            share = -(-self._trained(recipe) // recipe.gpus)
            extra = (self.dtype.itemsize + _FP32) * (min(share, _SUB_GROUP) if recipe.stage == 3 else share)
        return replace(resting, gradients=resting.gradients + extra, when="step")

    def _trained(self, recipe: TrainingSetup) -> int:
        return sum(numel(p) for p in self.model(recipe).parameters() if p.requires_grad)


def numel_total(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(numel(parameter) for parameter in model.parameters())


def _shared_out(
    recipe: TrainingSetup, weights: int, trained: int, size: int, total: int, hidden: int
) -> MemoryEstimate:
    """Who holds what.

    Args:
        recipe: stage of ZeRO, offload and number of GPUs.
        weights: bytes of all weights.
        trained: number of trained parameters.
        size: bytes of one gradient.
        total: number of parameters.
        hidden: width of the LLM.
    """
    gpus = recipe.gpus
    gradients, optimizer = trained * size, trained * _ADAM
    if recipe.stage == 0:
        buckets = gradients if gpus > 1 else 0
        return MemoryEstimate(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buckets)
    optimizer += trained * _FP32
    share, gradients = -(-optimizer // gpus), -(-gradients // gpus)
    host = 0
    if recipe.stage == 2:
        buffers = 2 * _ZERO2_BUCKET * size
    else:
        gathered = min(_ZERO3_LIVE, total) * weights // max(total, 1)
        buffers = gathered + (hidden * hidden + hidden * hidden * 9 // 10) * size
        weights = -(-weights // gpus)
    if recipe.offload:
        host = share + trained * _FP32 // gpus
        share = gradients = 0
        if recipe.stage == 3:
            host, weights = host + weights, 0
    return MemoryEstimate(weights=weights, gradients=gradients, optimizer=share, buffers=buffers, host=host)


def _moments(blocks: list[TracedBlock], recipe: TrainingSetup, resting: MemoryEstimate) -> Iterable[MemoryEstimate]:
    """Memory block by block, forward and back.

    Gradients of earlier micro-batches lie there from the start; else they grow while activations go.
    """
    share = 0 if recipe.offload else recipe.gpus if recipe.stage else 1
    grown = resting.gradients if recipe.accumulation > 1 else 0
    kept = copies = 0
    for block in blocks:
        work = _forward_work(block, recipe)
        yield replace(resting, gradients=grown, activations=kept + copies + work, when="forward")
        if block.part == HEAD:
            break
        copies += block.copies if _again(block, recipe) else 0
        kept += _kept(block, recipe)
    head = blocks[-1]
    yield replace(resting, gradients=grown, activations=kept + copies, logits=head.saved + 2 * head.widest, when="loss")
    for block in reversed(blocks):
        if not block.graph:
            continue
        kept -= 0 if block.part == HEAD else _kept(block, recipe)
        in_head = block.part == HEAD
        again = block.entering if _again(block, recipe) else 0
        work = kept + again + (0 if in_head else block.saved + 2 * block.widest + block.largest)
        logits = max(block.saved + 2 * block.widest, block.widest + block.largest) if in_head else 0
        yield replace(resting, gradients=grown, activations=work, logits=logits, when="backward")
        if recipe.accumulation == 1 and share:
            grown = min(grown + block.gradients // share, resting.gradients)


def _in_pieces(block: TracedBlock, recipe: TrainingSetup, shape: SampleShape) -> TracedBlock:
    """A block of the vision part where --vision_batch lets only so many items through at once.

    What is worked on shrinks; what is kept does not, unless it is run again, which happens piece by piece too.
    """
    items = shape.batch * shape.items
    if block.part not in ("vision", "resampler") or recipe.vision_batch is None or recipe.vision_batch >= items:
        return block
    share = recipe.vision_batch / items
    again = _again(block, recipe)
    return replace(
        block, widest=round(block.widest * share), saved=round(block.saved * share) if again else block.saved
    )


def _again(block: TracedBlock, recipe: TrainingSetup) -> bool:
    """Whether a block is a layer that is run again in the backward pass."""
    return block.layer and recipe.again(block.part)


def _kept(block: TracedBlock, recipe: TrainingSetup) -> int:
    """Bytes that stay after a block's forward pass."""
    if not block.graph:
        return 0
    return block.entering if _again(block, recipe) else block.saved


def _forward_work(block: TracedBlock, recipe: TrainingSetup) -> int:
    if block.graph and not recipe.again(block.part):
        return block.saved + block.widest
    return 2 * block.widest
