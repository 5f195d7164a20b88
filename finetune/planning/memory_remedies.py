"""Suggests flags after running out of GPU memory, those with the fewest side effects first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from finetune.arguments.training import TrainingArguments
from finetune.planning.memory_estimate import MemoryEstimate
from finetune.planning.training_setup import SampleShape, TrainingSetup

Case = tuple[TrainingSetup, SampleShape]

# What changes together is at most this many flags, and at most this many ways out are named.
_TOGETHER, _NAMED = 3, 3
# A way out that contains another one must need less by this factor.
_LESS = 0.9
# --vision_batch: a few items are enough to keep a GPU busy.
_VISION_BATCH = 8
# Lengths are shortened to a multiple of this.
_STEP = 64


@dataclass(frozen=True, slots=True)
class Change:
    """A change of flags that saves memory.

    Attributes:
        kind: changes of one kind exclude each other.
        price: their order: first what leaves the result as it is and costs little time, then more time, then what
            needs CPU memory, then what trains something else.
        flags: as given to finetune.py.
        apply: the setup and the shape of the micro-batch with it.
    """

    kind: str
    price: float
    flags: str
    apply: Callable[[TrainingSetup, SampleShape], Case]


@dataclass(frozen=True, slots=True)
class Remedy:
    """Flags that save memory.

    Attributes:
        flags: as given to finetune.py.
        memory: the estimate with them.
        resumes: whether a checkpoint of the run can be resumed with them.
    """

    flags: str
    memory: MemoryEstimate
    resumes: bool


def remedies(
    estimate: Callable[[TrainingSetup, SampleShape], MemoryEstimate],
    changes: Sequence[Change],
    setup: TrainingSetup,
    shape: SampleShape,
    limit: float,
) -> tuple[list[Remedy], bool]:
    """At most three ways out, and whether they fit.

    Args:
        estimate: the memory of a step.
        changes: those that are possible, see ``changes_of``.
        setup: of the run.
        shape: its largest micro-batch.
        limit: bytes of the GPU that an estimate may use.

    Returns:
        The cheapest that fit, by their price: first those of which none contains another, then those that need less
        than these. If nothing fits, those that save most.
    """
    found: list[tuple[frozenset[str], Remedy]] = []
    tried: list[tuple[frozenset[str], Remedy]] = []
    later: list[tuple[Change, ...]] = []
    for chosen in _combinations(changes):
        kinds = frozenset(change.kind for change in chosen)
        if any(before <= kinds for before, _ in found):
            later.append(chosen)
        elif (remedy := _remedy(estimate, chosen, setup, shape)) is not None:
            tried.append((kinds, remedy))
            if remedy.memory.total <= limit:
                found.append((kinds, remedy))
        if len(found) == _NAMED:
            break
    if not found:
        best = {kinds: remedy for kinds, remedy in sorted(tried, key=lambda each: -each[1].memory.total)}
        by_size = sorted(best.values(), key=lambda remedy: remedy.memory.total)
        return by_size[:_NAMED], False
    return _filled_up([remedy for _, remedy in found], (_remedy(estimate, each, setup, shape) for each in later)), True


def _filled_up(named: list[Remedy], more: Iterable[Remedy | None]) -> list[Remedy]:
    """The remedies, and some that contain one of them, in case that the estimate is too low."""
    for remedy in more if len(named) < _NAMED else ():
        if remedy is not None and remedy.memory.total < _LESS * min(each.memory.total for each in named):
            named.append(remedy)
            if len(named) == _NAMED:
                break
    return named


def _combinations(changes: Sequence[Change]) -> Iterable[tuple[Change, ...]]:
    """Sets of changes of different kinds, by their price."""
    kinds = dict.fromkeys(change.kind for change in changes)
    choices = [[None, *(change for change in changes if change.kind == kind)] for kind in kinds]
    sets = (tuple(filter(None, chosen)) for chosen in product(*choices))
    return sorted(
        (chosen for chosen in sets if 0 < len(chosen) <= _TOGETHER),
        key=lambda chosen: (sum(change.price for change in chosen), len(chosen)),
    )


def _remedy(
    estimate: Callable[[TrainingSetup, SampleShape], MemoryEstimate],
    chosen: Sequence[Change],
    setup: TrainingSetup,
    shape: SampleShape,
) -> Remedy | None:
    """The changes together; None where they exclude each other."""
    after = setup, shape
    for change in chosen:
        after = change.apply(*after)
    if after[0].packed and after[0].stage == 3:
        return None
    resumes = (after[0].stage, after[0].method) == (setup.stage, setup.method)
    return Remedy(" ".join(change.flags for change in chosen), estimate(*after), resumes)


def changes_of(
    training: TrainingArguments, setup: TrainingSetup, shape: SampleShape, parts: Iterable[str]
) -> list[Change]:
    """The changes that have an effect on a run, by their price.

    Args:
        training: its flags.
        setup: the same for the estimate.
        shape: its largest micro-batch.
        parts: parts of the model.
    """
    found = [*_vision_batch(setup, shape), *_smaller_batch(training, shape), *_recomputing(training, setup, parts)]
    found += [*_sharding(setup), *_shorter(training, shape)]
    if setup.method == "lora" and not setup.packed:
        found.append(Change("q_lora", 24, "--q_lora true", lambda s, b: (replace(s, method="qlora"), b)))
    return sorted(found, key=lambda change: change.price)


def _vision_batch(setup: TrainingSetup, shape: SampleShape) -> Iterator[Change]:
    if shape.batch * shape.items > _VISION_BATCH < (setup.vision_batch or _VISION_BATCH + 1):
        flags = f"--vision_batch {_VISION_BATCH}"
        yield Change("vision_batch", 1, flags, lambda s, b: (replace(s, vision_batch=_VISION_BATCH), b))


def _smaller_batch(training: TrainingArguments, shape: SampleShape) -> Iterator[Change]:
    """Fewer samples in a micro-batch and more micro-batches, so that the global batch stays."""
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    for price, fewer in ((2.0, batch // 2), (2.5, 1)):
        if not 0 < fewer < batch or batch % fewer or training.packing == "best_fit" or (price > 2 and batch < 4):
            continue
        flags = f"--per_device_train_batch_size {fewer} --gradient_accumulation_steps {steps * batch // fewer}"
        if training.packing == "off":
            yield _batch_change(price, flags, steps * batch // fewer, {"batch": fewer})
        else:
            yield _batch_change(price, flags, steps * batch // fewer, _row(shape, shape.tokens * fewer // batch))
    if training.packing == "best_fit" and shape.tokens // 2 >= training.model_max_length:
        flags = f"--packing_tokens {shape.tokens // 2} --gradient_accumulation_steps {steps * 2}"
        yield _batch_change(2, flags, steps * 2, _row(shape, shape.tokens // 2))


def _batch_change(price: float, flags: str, steps: int, smaller: dict[str, int]) -> Change:
    return Change("batch", price, flags, lambda s, b: (replace(s, accumulation=steps), replace(b, **smaller)))


def _row(shape: SampleShape, tokens: int) -> dict[str, int]:
    """A packed row of fewer tokens, with its share of the visual items."""
    return {"tokens": tokens, "items": -(-shape.items * tokens // shape.tokens)}


def _recomputing(training: TrainingArguments, setup: TrainingSetup, parts: Iterable[str]) -> Iterator[Change]:
    """More parts with gradient checkpointing; recomputing the tower costs less time than the language model."""
    known = [*parts]
    if setup.checkpointing and setup.checkpoint_parts is None:
        return
    now = set(setup.checkpoint_parts or ()) if setup.checkpointing else set()
    wanted: list[tuple[float, set[str]]] = [(3, {"vision"})] if setup.vision else []
    for price, some in [*wanted, (5, {"llm"}), (6, {"llm", "vision", "audio"} & set(known))]:
        more = now | some
        if more == now:
            continue
        named = " ".join(part for part in known if part in more)
        flags = "--gradient_checkpointing true"
        if training.checkpoint_parts or price < 6:
            yield _recompute_change(price, f"{flags} --checkpoint_parts {named}", tuple(sorted(more)))
        else:
            yield _recompute_change(price, flags, None)


def _recompute_change(price: float, flags: str, parts: tuple[str, ...] | None) -> Change:
    return Change("recompute", price, flags, lambda s, b: (replace(s, checkpointing=True, checkpoint_parts=parts), b))


def _sharding(setup: TrainingSetup) -> Iterator[Change]:
    """Higher ZeRO stages, and offload."""
    for price, stage, offload in ((7, 2, False), (8, 3, False), (16, 2, True), (18, 3, True)):
        several = setup.gpus > 1
        if (stage, offload) == (setup.stage, setup.offload) or stage < setup.stage or (setup.offload and not offload):
            continue
        if offload or several:
            yield _sharding_change(price, stage, offload=offload)


def _sharding_change(price: float, stage: int, *, offload: bool) -> Change:
    def apply(setup: TrainingSetup, shape: SampleShape) -> Case:
        return replace(setup, stage=stage, offload=offload), shape

    return Change("zero", price, f"--deepspeed ds_config_zero{stage}{'_offload' if offload else ''}.json", apply)


def _shorter(training: TrainingArguments, shape: SampleShape) -> Iterator[Change]:
    """A lower --model_max_length: longer samples lose slices or turns (--overlong)."""
    longest = min(training.model_max_length, shape.tokens)
    for price, share in ((40, 0.75), (48, 0.5)):
        length = int(longest * share) // _STEP * _STEP
        if length >= _STEP:
            smaller: dict[str, Any] = {"tokens": length, "items": max(int(shape.items * length / longest), 1)}
            if training.packing != "off":
                smaller = _row(shape, shape.tokens * length // longest)
            if not shape.items:
                smaller["items"] = 0
            yield _shorter_change(price, length, smaller)


def _shorter_change(price: float, length: int, smaller: dict[str, int]) -> Change:
    # After a change of the batch, a packed row is shorter still.
    def apply(setup: TrainingSetup, shape: SampleShape) -> Case:
        return setup, replace(shape, **{name: min(value, getattr(shape, name)) for name, value in smaller.items()})

    return Change("length", price, f"--model_max_length {length}", apply)
