"""Estimates the peak memory of a training step on one GPU: weights, gradients, optimizer, activations, buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from finetune.families import detect
from finetune.models.memory_saving import RESAMPLED_PATCHES
from finetune.planning.meta_model import build_meta_model, prepare_meta_model, quantised
from finetune.planning.meta_step import LM_HEAD, blocks_of_step
from finetune.planning.traced_block import TracedBlock
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.training.freezing import numel

GIB = 2**30
# CUDA context, workspaces of libraries and NCCL channels; and fragmentation of torch's allocator. Not measured.
CONTEXT = int(1.0 * GIB)
SLACK = 0.03
# Sizes in ds_config_zero2.json and ds_config_zero3.json, in elements.
_ZERO2_BUCKET = 200_000_000
_ZERO3_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000
# nf4 with double quantisation: 4 bit, 8 bit per 64 weights, 32 bit per 64 * 256.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_FP32, _ADAM = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one GPU at the peak of a training step.

    Attributes:
        weights: weights of the model on this GPU.
        gradients: gradients of trained parameters.
        optimizer: Adam's two moments, and fp32 master weights with DeepSpeed.
        activations: saved activations and temporary tensors.
        logits: logits, loss and their gradients.
        buffers: communication buffers: ZeRO's buckets and gathered layers, DDP's buckets.
        context: CUDA context and fragmentation of torch's allocator.
        host: CPU memory of this process (offload), not part of the total.
        when: phase of the peak: "loss", "forward", "backward" or "step".
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


def estimate(config: dict[str, Any], setup: TrainingSetup, shape: SampleShape) -> MemoryEstimate:
    """Peak memory of one GPU.

    Raises:
        UnknownFamilyError: a config.json of none of the supported generations.
        ArgumentError: flags that contradict each other or the family.
    """
    return MemoryEstimator(config).memory(setup, shape)


class MemoryEstimator:
    """Estimates for one checkpoint; models and traces are shared between setups.

    Args:
        config: config.json as a dictionary.
        dtype: compute dtype.
        gpu: whether to estimate for a GPU; a CPU has no context, and its kernels save other tensors.
        model: the model on the meta device, as all setups train it; None to build it for each setup.
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
        self._known_sizes: dict[tuple[int, bool], tuple[int, int, int]] = {}

    def model(self, setup: TrainingSetup) -> nn.Module:
        """The model on the meta device, frozen and wrapped as in the setup."""
        if self._given is not None:
            return self._given
        alike = replace(setup, stage=min(setup.stage, 1), offload=False, gpus=1, vision_batch=None)
        alike = replace(alike, checkpointing=False, checkpoint_parts=None)
        alike = replace(alike, method="lora" if setup.adapters else setup.method)
        if alike not in self._models:
            self._models[alike] = prepare_meta_model(self.config, alike, self.dtype)
        return self._models[alike]

    def blocks(self, setup: TrainingSetup, shape: SampleShape) -> list[TracedBlock]:
        """The blocks of the forward pass, in order."""
        model, autocast = self.model(setup), not setup.master_weights and self.dtype != torch.float32
        key = (id(model), shape)
        if key not in self._blocks:
            self._blocks[key] = blocks_of_step(model, self.family, shape, autocast=autocast, gpu=self.gpu)
        return self._blocks[key]

    def parameters(self) -> int:
        """Number of parameters of the checkpoint, without adapters."""
        return numel_total(build_meta_model(self.config))

    def memory(self, setup: TrainingSetup, shape: SampleShape) -> MemoryEstimate:
        """Peak memory of one GPU.

        Raises:
            ArgumentError: flags that contradict each other or the family.
        """
        resting = self.resting(setup)
        blocks = [_in_chunks(block, setup, shape) for block in self.blocks(setup, shape)]
        peak = max((*_timeline(blocks, setup, resting), self._in_step(setup, resting)), key=lambda m: m.total)
        if not self.gpu:
            return peak
        return replace(peak, context=CONTEXT + int(SLACK * peak.total))

    def resting(self, setup: TrainingSetup) -> MemoryEstimate:
        """Memory between two steps, with the gradients as they are at the end of a step."""
        weights, trained, total = self._sizes(setup)
        size = self.dtype.itemsize if setup.master_weights else _FP32
        return _sharded(setup, weights, trained, size, total, self._hidden())

    def _sizes(self, setup: TrainingSetup) -> tuple[int, int, int]:
        """Bytes of all weights, number of trained parameters, number of parameters."""
        model, quantise = self.model(setup), setup.packed
        if (known := self._known_sizes.get((id(model), quantise))) is not None:
            return known
        packed = quantised(model, self.config) if quantise else set()
        weights, trained, total = 0, 0, 0
        for name, parameter in model.named_parameters():
            size = _NF4_BYTES if name in packed else parameter.element_size()
            weights += round(numel(parameter) * size)
            trained += numel(parameter) if parameter.requires_grad else 0
            total += numel(parameter)
        return self._known_sizes.setdefault((id(model), quantise), (weights, trained, total))

    def _hidden(self) -> int:
        return (self.config.get("text_config") or self.config)["hidden_size"]

    def _in_step(self, setup: TrainingSetup, resting: MemoryEstimate) -> MemoryEstimate:
        """Memory during the optimizer step: DeepSpeed flattens gradients and casts them to fp32, a group at a time."""
        extra = 0
        if setup.master_weights and not setup.offload:
            _, trained, _ = self._sizes(setup)
            share = -(-trained // setup.gpus)
            extra = (self.dtype.itemsize + _FP32) * (min(share, _SUB_GROUP) if setup.stage == 3 else share)
        return replace(resting, gradients=resting.gradients + extra, when="step")


def numel_total(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(numel(parameter) for parameter in model.parameters())


def _sharded(setup: TrainingSetup, weights: int, trained: int, size: int, total: int, hidden: int) -> MemoryEstimate:
    """Memory of one GPU between steps, after sharding by ZeRO.

    Args:
        setup: ZeRO stage, offload and number of GPUs.
        weights: bytes of all weights.
        trained: number of trained parameters.
        size: bytes of one gradient.
        total: number of parameters.
        hidden: width of the LLM.
    """
    gpus = setup.gpus
    gradients, optimizer = trained * size, trained * _ADAM
    if setup.stage == 0:
        buckets = gradients if gpus > 1 else 0
        return MemoryEstimate(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buckets)
    optimizer += trained * _FP32
    share, gradients = -(-optimizer // gpus), -(-gradients // gpus)
    host = 0
    if setup.stage == 2:
        buffers = 2 * _ZERO2_BUCKET * size
    else:
        gathered = min(_ZERO3_LIVE, total) * weights // max(total, 1)
        buffers = gathered + (hidden * hidden + hidden * hidden * 9 // 10) * size
        weights = -(-weights // gpus)
    if setup.offload:
        host = share + trained * _FP32 // gpus
        share = gradients = 0
        if setup.stage == 3:
            host, weights = host + weights, 0
    return MemoryEstimate(weights=weights, gradients=gradients, optimizer=share, buffers=buffers, host=host)


def _timeline(blocks: list[TracedBlock], setup: TrainingSetup, resting: MemoryEstimate) -> Iterable[MemoryEstimate]:
    """Memory at every block of the forward and the backward pass.

    With accumulation, gradients of earlier micro-batches exist from the start; else they grow during the backward pass.
    """
    share = 0 if setup.offload else setup.gpus if setup.stage else 1
    grown = resting.gradients if setup.accumulation > 1 else 0
    kept = copies = 0
    for block in blocks:
        work = _forward_work(block, setup)
        yield replace(resting, gradients=grown, activations=kept + copies + work, when="forward")
        if block.part == LM_HEAD:
            break
        copies += block.copies if _is_recomputed(block, setup) else 0
        kept += _kept(block, setup)
    head = blocks[-1]
    yield replace(resting, gradients=grown, activations=kept + copies, logits=head.saved + 2 * head.widest, when="loss")
    for block in reversed(blocks):
        if not block.graph:
            continue
        kept -= 0 if block.part == LM_HEAD else _kept(block, setup)
        in_head = block.part == LM_HEAD
        entering = block.entering if _is_recomputed(block, setup) else 0
        work = kept + entering + (0 if in_head else block.saved + 2 * block.widest + block.largest)
        logits = max(block.saved + 2 * block.widest, block.widest + block.largest) if in_head else 0
        yield replace(resting, gradients=grown, activations=work, logits=logits, when="backward")
        if setup.accumulation == 1 and share:
            grown = min(grown + block.gradients // share, resting.gradients)


def _in_chunks(block: TracedBlock, setup: TrainingSetup, shape: SampleShape) -> TracedBlock:
    """A block of the vision part when it is called on a chunk of the items: by --vision_batch, or to recompute it.

    Temporary tensors shrink; saved activations do not, unless they are recomputed, which is done chunk by chunk too.
    The gradients of the chunks are then added up until the last one is there.
    """
    items = shape.batch * shape.items
    most = items if setup.vision_batch is None else setup.vision_batch
    if block.part == "resampler" and _is_recomputed(block, setup) and setup.stage != 3:
        most = min(most, max(RESAMPLED_PATCHES // shape.patches, 1))
    if block.part not in ("vision", "resampler") or most >= items:
        return block
    widest = round(block.widest * most / items)
    if not _is_recomputed(block, setup):
        return replace(block, widest=widest)
    saved = block.copies + round((block.saved - block.copies) * most / items)
    return replace(block, widest=widest, saved=saved, largest=block.gradients)


def _is_recomputed(block: TracedBlock, setup: TrainingSetup) -> bool:
    """Whether a block is a layer that is recomputed in the backward pass."""
    return block.layer and setup.recomputes(block.part)


def _kept(block: TracedBlock, setup: TrainingSetup) -> int:
    """Bytes saved after a block's forward pass."""
    if not block.graph:
        return 0
    return block.entering if _is_recomputed(block, setup) else block.saved


def _forward_work(block: TracedBlock, setup: TrainingSetup) -> int:
    if block.graph and not setup.recomputes(block.part):
        return block.saved + block.widest
    return 2 * block.widest
