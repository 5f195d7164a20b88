"""Which layers a training run has to run again in the backward pass, by what fits on its GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from finetune.arguments.activation_checkpointing import set_checkpointing
from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments, row_capacity
from finetune.checkpoints.manifest import zero_stage
from finetune.encoding.length_policy import LengthPolicy
from finetune.planning.memory_estimate import GIB, MemoryEstimate, MemoryPlanner
from finetune.planning.meta_model import adapted, quiet
from finetune.planning.training_setup import Method, SampleShape, TrainingSetup
from finetune.runtime.distributed import from_main_process, is_main_process
from finetune.sample import DataError
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

# Records whose length is measured; the longest of them counts.
_MEASURED = 500
SHARE = 0.92
"""Of the GPU's memory: a plan leaves out what other programs hold, and the kernels' workspaces are a rule of thumb."""
_SOME: tuple[tuple[str, ...], ...] = ((), ("vision",), ("llm",))
"""Parts to run again, from fast to slow; to run all of them again comes last."""

Parts = list[str] | None


def measured_shape(length_policy: LengthPolicy, samples: Any, shape: SampleShape) -> SampleShape | None:
    """The shape with the longest of some records, and the one with the most patches; None where none can be used."""
    tokens = items = patches = labels = 0
    for index in range(0, len(samples), max(len(samples) // _MEASURED, 1)):
        try:
            fitted = length_policy.fit(samples[index])
        except DataError:
            continue
        measure = length_policy.encoder.size_of(fitted.sample, fitted.plans, fitted.rendered)
        tokens = max(tokens, measure.tokens)
        labels = max(labels, sum(label >= 0 for label in fitted.rendered.labels))
        if measure.patches > patches:
            items, patches = measure.items, measure.patches
    if not tokens:
        return None
    share = min(labels / tokens, 1.0)
    return replace(shape, tokens=tokens, items=items, patches=-(-patches // max(items, 1)), labelled=share)


def step_shape(
    training: TrainingArguments, length_policy: LengthPolicy, samples: Any, *, streaming: bool = False
) -> SampleShape:
    """The largest micro-batch of a run; where not all records are measured, one of them may be as long as the limit.

    Args:
        training: the run's flags.
        length_policy: of its samples.
        samples: its records, or the first of a stream.
        streaming: whether there are more.

    Raises:
        ArgumentError: none of the records can be used.
    """
    shape = measured_shape(length_policy, samples, SampleShape(batch=training.per_device_train_batch_size))
    if shape is None:
        raise ArgumentError("none of the records can be used; python -m finetune check tells why")
    if streaming or len(samples) > _MEASURED:
        shape = replace(shape, tokens=max(shape.tokens, training.model_max_length))
    if training.packing == "off":
        return shape
    # One row, full of samples that have as many images for their length as the one with the most.
    tokens = max(row_capacity(training), shape.tokens)
    items = -(-shape.items * tokens // shape.tokens)
    most = training.packing_items if training.packing == "best_fit" else None
    return replace(shape, batch=1, tokens=tokens, items=min(items, max(most or items, shape.items)))


def recipe_of(training: TrainingArguments, lora: LoraArguments) -> TrainingSetup:
    """How a run trains, as a plan sees it."""
    config: dict[str, Any] = training.deepspeed if isinstance(training.deepspeed, dict) else {}
    moved = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    method: Method = "qlora" if lora.q_lora else "lora" if training.use_lora else "full"
    return TrainingSetup(
        method=method,
        stage=zero_stage(config),
        offload=moved != "none",
        gpus=training.world_size,
        accumulation=training.gradient_accumulation_steps,
        vision_batch=training.vision_batch,
        lora_r=lora.lora_r,
    )


def fitting_parts(
    config: dict[str, Any],
    training: TrainingArguments,
    lora: LoraArguments,
    shape: SampleShape,
    limit: int,
) -> tuple[Parts, MemoryEstimate]:
    """The fewest layers that have to be run again, and the memory that is planned then.

    Args:
        config: config.json of the checkpoint.
        training: the run's flags.
        lora: its adapters.
        shape: its largest micro-batch.
        limit: bytes that it may use on a GPU.

    Returns:
        The parts whose layers are run again, empty for none, None for all, also where that is too much as well.
    """
    recipe, dtype = recipe_of(training, lora), getattr(torch, training.compute_dtype)
    with quiet():
        planner = MemoryPlanner(config, dtype, model=adapted(config, training, lora, recipe, dtype))
        for parts in _SOME:
            memory = planner.memory(replace(recipe, checkpointing=bool(parts), checkpoint_parts=parts), shape)
            if memory.total <= limit:
                return [*parts], memory
        return None, planner.memory(replace(recipe, checkpointing=True), shape)


def settle(
    config: dict[str, Any], training: TrainingArguments, lora: LoraArguments, measured: Callable[[], SampleShape]
) -> None:
    """Puts the parts that have to be run again in the place of ``--checkpoint_parts fit``; rank 0 decides.

    Args:
        config: config.json of the checkpoint.
        training: the run's flags, which are changed.
        lora: its adapters.
        measured: its largest micro-batch, see ``step_shape``; asked for only where it counts.
    """
    if training.checkpoint_parts != ["fit"]:
        return
    chosen = " ".join(_chosen(config, training, lora, measured)) if is_main_process() else None
    words = (from_main_process(chosen) or "").split()
    set_checkpointing(training, bool(words))
    training.checkpoint_parts = None if words in ([], ["all"]) else words


def _chosen(
    config: dict[str, Any], training: TrainingArguments, lora: LoraArguments, measured: Callable[[], SampleShape]
) -> list[str]:
    """Parts, nothing for none of them, or "all"."""
    if (memory := _gpu_memory(training)) is None:
        logger.info("--checkpoint_parts fit: no GPU whose memory is known, so the layers of all parts are run again")
        return ["all"]
    shape = measured()
    parts, planned = fitting_parts(config, training, lora, shape, int(memory * SHARE))
    what = "all layers are" if parts is None else f"layers of {' and '.join(parts)} are" if parts else "no layers are"
    size = f"{planned.total / GIB:.1f} of {memory / GIB:.1f} GB are planned for {shape.batch} x {shape.tokens} tokens"
    if planned.total > memory * SHARE:
        size += "; python -m finetune plan tells what would fit"
    logger.info("--checkpoint_parts fit: %s run again, %s", what, size)
    return ["all"] if parts is None else parts


def _gpu_memory(training: TrainingArguments) -> int | None:
    """Bytes of this process' GPU; None without one."""
    if training.device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(training.device).total_memory
