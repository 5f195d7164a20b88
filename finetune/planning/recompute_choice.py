"""--checkpoint_parts fit: chooses the parts with gradient checkpointing from the memory estimate and the GPU."""

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
from finetune.model_folders.stored_4bit import stored_in_4bit
from finetune.planning.memory_estimate import GIB, MemoryEstimate, MemoryEstimator
from finetune.planning.meta_model import adapt_meta_model, quiet
from finetune.planning.training_setup import Method, SampleShape, TrainingSetup
from finetune.runtime.distributed import from_main_process, is_main_process
from finetune.sample import DataError
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

# Records whose lengths are measured, to find the longest.
_MEASURED = 500
SHARE = 0.92
"""Share of the GPU's memory that an estimate may use; other programs and workspaces of kernels are not estimated."""
_SOME: tuple[tuple[str, ...], ...] = ((), ("vision",), ("llm",))
"""Parts to recompute, from fast to slow; recomputing all comes last."""

Parts = list[str] | None


def measured_shape(length_policy: LengthPolicy, samples: Any, shape: SampleShape) -> SampleShape | None:
    """The shape with the maximum of tokens, labels and patches over some records; None if none can be used."""
    tokens = items = patches = labels = 0
    pairs = False
    for index in range(0, len(samples), max(len(samples) // _MEASURED, 1)):
        try:
            fitted = length_policy.fit(samples[index])
        except DataError:
            continue
        measure = length_policy.encoder.size_of(fitted.sample, fitted.plans, fitted.rendered)
        tokens = max(tokens, fitted.longest)
        labels = max(labels, sum(label >= 0 for label in fitted.rendered.labels))
        pairs = pairs or fitted.rejected is not None
        if measure.patches > patches:
            items, patches = measure.items, measure.patches
    if not tokens:
        return None
    share, each = min(labels / tokens, 1.0), -(-patches // max(items, 1))
    found = replace(shape, tokens=tokens, items=items, patches=each, labelled=share)
    return of_pairs(found) if pairs else found


def of_pairs(shape: SampleShape) -> SampleShape:
    """The shape of a micro-batch whose samples are preference pairs: two rows each, which share their media."""
    return replace(shape, batch=2 * shape.batch, items=-(-shape.items // 2))


def step_shape(
    training: TrainingArguments, length_policy: LengthPolicy, samples: Any, *, streaming: bool = False
) -> SampleShape:
    """The largest micro-batch of a run; if not all records are measured, model_max_length is assumed.

    Args:
        training: the run's flags.
        length_policy: length policy of its samples.
        samples: its records, or the first of a stream.
        streaming: whether there are more.

    Raises:
        ArgumentError: none of the records can be used.
    """
    shape = measured_shape(length_policy, samples, SampleShape(batch=training.per_device_train_batch_size))
    if shape is None:
        raise ArgumentError("none of the records can be used; python -m finetune check shows the reasons")
    if streaming or len(samples) > _MEASURED:
        shape = replace(shape, tokens=max(shape.tokens, training.model_max_length))
    if training.packing == "off":
        return shape
    # One full row; its images are scaled up from the sample with the most.
    tokens = max(row_capacity(training), shape.tokens)
    items = -(-shape.items * tokens // shape.tokens)
    most = training.packing_items if training.packing == "best_fit" else None
    return replace(shape, batch=1, tokens=tokens, items=min(items, max(most or items, shape.items)))


def setup_of(base: dict[str, Any], training: TrainingArguments, lora: LoraArguments) -> TrainingSetup:
    """The setup of a run for memory estimates; ``base`` is config.json of its checkpoint."""
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
        in_4bit=stored_in_4bit(base),
    )


def fitting_parts(
    config: dict[str, Any],
    training: TrainingArguments,
    lora: LoraArguments,
    shape: SampleShape,
    limit: int,
) -> tuple[Parts, MemoryEstimate]:
    """The fewest parts to recompute so that a step fits, and the memory estimate.

    Args:
        config: config.json of the checkpoint.
        training: the run's flags.
        lora: its adapters.
        shape: its largest micro-batch.
        limit: bytes available on a GPU.

    Returns:
        The parts whose layers are recomputed: empty for none, None for all, also if that does not fit either.
    """
    setup, dtype = setup_of(config, training, lora), getattr(torch, training.compute_dtype)
    with quiet():
        estimator = MemoryEstimator(config, dtype, model=adapt_meta_model(config, training, lora, setup, dtype))
        for parts in _SOME:
            memory = estimator.memory(replace(setup, checkpointing=bool(parts), checkpoint_parts=parts), shape)
            if memory.total <= limit:
                return [*parts], memory
        return None, estimator.memory(replace(setup, checkpointing=True), shape)


def choose_parts(
    config: dict[str, Any], training: TrainingArguments, lora: LoraArguments, measured: Callable[[], SampleShape]
) -> None:
    """Replaces ``--checkpoint_parts fit`` by the chosen parts; rank 0 chooses for all.

    Args:
        config: config.json of the checkpoint.
        training: the run's flags, which are changed.
        lora: its adapters.
        measured: returns the largest micro-batch, see ``step_shape``; called only if needed.
    """
    if training.checkpoint_parts != ["fit"]:
        return
    chosen = " ".join(_chosen(config, training, lora, measured)) if is_main_process() else None
    parts = (from_main_process(chosen) or "").split()
    set_checkpointing(training, bool(parts))
    training.checkpoint_parts = None if parts in ([], ["all"]) else parts


def _chosen(
    config: dict[str, Any], training: TrainingArguments, lora: LoraArguments, measured: Callable[[], SampleShape]
) -> list[str]:
    """The chosen parts, empty for none, or ["all"]."""
    if (memory := _gpu_memory(training)) is None:
        logger.info("--checkpoint_parts fit: no GPU, so its memory is unknown: the layers of all parts are recomputed")
        return ["all"]
    shape = measured()
    parts, estimated = fitting_parts(config, training, lora, shape, int(memory * SHARE))
    what = "all layers are" if parts is None else f"layers of {' and '.join(parts)} are" if parts else "no layers are"
    size = f"{estimated.total / GIB:.1f} of {memory / GIB:.1f} GB estimated for {shape.batch} x {shape.tokens} tokens"
    if estimated.total > memory * SHARE:
        size += "; python -m finetune plan lists setups that fit"
    logger.info("--checkpoint_parts fit: %s recomputed, %s", what, size)
    return ["all"] if parts is None else parts


def _gpu_memory(training: TrainingArguments) -> int | None:
    """Memory of this process' GPU in bytes; None without one."""
    if training.device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(training.device).total_memory
