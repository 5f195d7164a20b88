"""Searches training setups (ZeRO stage, offload, recomputation), fastest first, for one that fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from finetune.planning.memory_estimate import MemoryEstimate, MemoryEstimator
from finetune.planning.training_setup import METHODS, Method, SampleShape, TrainingSetup

_NONE, _VISION, _LLM, _ALL = (), ("vision",), ("llm",), None
# ZeRO stage, offload, recomputed parts; from fast to slow. Recomputing all layers costs a third of the time, those of
# the vision tower alone a quarter of that; the cost of gathering weights and of offload depends on the interconnect.
_LADDER = (
    *((stage, False, parts) for parts in (_NONE, _VISION, _LLM, _ALL) for stage in (0, 2)),
    *((3, False, parts) for parts in (_NONE, _VISION, _LLM, _ALL)),
    (2, True, _ALL),
    (3, True, _ALL),
)
# --vision_batch when memory is short; a few items are enough to keep a GPU busy.
_VISION_BATCH = 8


def settings(method: Method, gpus: int, base: TrainingSetup) -> Iterator[TrainingSetup]:
    """The setups of a method from fast to slow.

    Args:
        method: what trains.
        gpus: number of processes.
        base: the other settings.
    """
    for stage, offload, parts in _LADDER:
        if stage == 3 and replace(base, method=method).packed:
            continue
        if gpus == 1 and stage == 3 and not offload:
            continue  # one GPU has nothing to shard
        setup = replace(base, method=method, gpus=gpus, stage=stage, offload=offload, checkpointing=parts != _NONE)
        if not parts:
            yield setup
        elif setup.vision:  # a frozen tower saves no activations
            yield replace(setup, checkpoint_parts=parts)


def rows(
    estimator: MemoryEstimator, shape: SampleShape, base: TrainingSetup, methods: Sequence[Method]
) -> list[tuple[TrainingSetup, MemoryEstimate]]:
    """Every setup of some methods with its memory, from fast to slow."""
    return [
        (setup, estimator.memory(setup, shape)) for method in methods for setup in settings(method, base.gpus, base)
    ]


def cheapest(
    estimator: MemoryEstimator, shape: SampleShape, base: TrainingSetup, method: Method, limit: int
) -> tuple[TrainingSetup, MemoryEstimate] | None:
    """The fastest setup of a method that fits; --vision_batch is tried if no other setup fits.

    Args:
        estimator: of the checkpoint.
        shape: the largest micro-batch.
        base: number of GPUs and the other settings.
        method: what trains.
        limit: bytes of a GPU.
    """
    vision_batches = [base.vision_batch]
    if base.vision_batch is None and shape.batch * shape.items > _VISION_BATCH:
        vision_batches.append(_VISION_BATCH)
    for vision_batch in vision_batches:
        for setup in settings(method, base.gpus, replace(base, vision_batch=vision_batch)):
            memory = estimator.memory(setup, shape)
            if memory.total <= limit:
                return setup, memory
    return None


def gpus_needed(
    estimator: MemoryEstimator, shape: SampleShape, base: TrainingSetup, method: Method, limit: int, most: int = 64
) -> tuple[TrainingSetup, MemoryEstimate] | None:
    """The fastest setup on the smallest number of GPUs (1, 2, 4, ...) on which a method fits."""
    gpus = base.gpus
    while gpus <= most:
        if found := cheapest(estimator, shape, replace(base, gpus=gpus), method, limit):
            return found
        gpus *= 2
    return None


ALL_METHODS: tuple[Method, ...] = tuple(METHODS)
