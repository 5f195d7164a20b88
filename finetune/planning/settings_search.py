"""Settings in the order of what they cost in time, and the first of them that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from finetune.planning.memory_estimate import MemoryEstimate, MemoryPlanner
from finetune.planning.training_setup import METHODS, Method, SampleShape, TrainingSetup

_NONE, _VISION, _LLM, _ALL = (), ("vision",), ("llm",), None
# Stage of ZeRO, offload, parts that are run again; from fast to slow. Running all layers again costs a third of the
# time, those of the vision tower alone a quarter of that; gathering weights and moving them to the CPU costs more the
# slower the links are.
_LADDER = (
    *((stage, False, parts) for parts in (_NONE, _VISION, _LLM, _ALL) for stage in (0, 2)),
    *((3, False, parts) for parts in (_NONE, _VISION, _LLM, _ALL)),
    (2, True, _ALL),
    (3, True, _ALL),
)
# Of a tower that is encoded in pieces; a few items keep a GPU busy.
_VISION_BATCH = 8


def settings(method: Method, gpus: int, base: TrainingSetup) -> Iterator[TrainingSetup]:
    """The recipes of a method from fast to slow.

    Args:
        method: what trains.
        gpus: processes.
        base: what else is asked for.
    """
    for stage, offload, parts in _LADDER:
        if method == "qlora" and stage == 3:
            continue  # weights of 4 bit cannot be partitioned
        if gpus == 1 and stage == 3 and not offload:
            continue  # nobody to share with
        recipe = replace(base, method=method, gpus=gpus, stage=stage, offload=offload, checkpointing=parts != _NONE)
        if not parts:
            yield recipe
        elif recipe.vision:  # a frozen tower keeps nothing, so there is nothing to choose
            yield replace(recipe, checkpoint_parts=parts)


def rows(
    planner: MemoryPlanner, shape: SampleShape, base: TrainingSetup, methods: Sequence[Method]
) -> list[tuple[TrainingSetup, MemoryEstimate]]:
    """Every setting of some methods with its memory, from fast to slow."""
    return [
        (recipe, planner.memory(recipe, shape)) for method in methods for recipe in settings(method, base.gpus, base)
    ]


def cheapest(
    planner: MemoryPlanner, shape: SampleShape, base: TrainingSetup, method: Method, limit: int
) -> tuple[TrainingSetup, MemoryEstimate] | None:
    """The fastest setting of a method that fits; encoding images in pieces is tried where nothing else helps.

    Args:
        planner: of the checkpoint.
        shape: the largest micro-batch.
        base: number of GPUs and what else is asked for.
        method: what trains.
        limit: bytes of a GPU.
    """
    pieces = [base.vision_batch]
    if base.vision_batch is None and shape.batch * shape.items > _VISION_BATCH:
        pieces.append(_VISION_BATCH)
    for vision_batch in pieces:
        for recipe in settings(method, base.gpus, replace(base, vision_batch=vision_batch)):
            memory = planner.memory(recipe, shape)
            if memory.total <= limit:
                return recipe, memory
    return None


def gpus_needed(
    planner: MemoryPlanner, shape: SampleShape, base: TrainingSetup, method: Method, limit: int, most: int = 64
) -> tuple[TrainingSetup, MemoryEstimate] | None:
    """The cheapest setting on the smallest number of GPUs (1, 2, 4, ...) on which a method fits."""
    gpus = base.gpus
    while gpus <= most:
        if found := cheapest(planner, shape, replace(base, gpus=gpus), method, limit):
            return found
        gpus *= 2
    return None


ALL_METHODS: tuple[Method, ...] = tuple(METHODS)
