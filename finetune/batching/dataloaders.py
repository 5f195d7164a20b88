"""Training dataloaders whose batches depend on sample lengths: packed, grouped by length, balanced over ranks.

Also checks that the kernels are installed that packing needs with linear attention (4.6 and later).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils.import_utils import is_kernels_available

from finetune.arguments.training import BY_SIZE, TrainingArguments, row_capacity
from finetune.batching.lengths import SampleLengths, measure
from finetune.batching.samplers import (
    BatchPlan,
    BestFitPlan,
    PackingOptions,
    PackPlan,
    RankPackSampler,
    SamplerEpochCallback,
    SeededLengthGroupedSampler,
    fill,
)
from finetune.encoding.example import Example
from finetune.encoding.sample_policy import SamplePolicy
from finetune.families.family import Family
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[Example]], dict[str, Any]]


class Measured(Protocol):
    """A map-style data set with a sample policy."""

    sample_policy: SamplePolicy

    def __len__(self) -> int:
        """Number of samples."""
        ...


def check_kernels(args: TrainingArguments, family: Family, *, from_hub: bool) -> None:
    """Checks that linear attention kernels are available if packing or ``--use_hub_kernels`` needs them.

    Args:
        args: the flags.
        family: model family.
        from_hub: whether the kernels may be downloaded from the hub.

    Raises:
        ArgumentError: they are missing.
    """
    if from_hub:
        _check_hub_kernels(args, family)
    elif args.packing != "off" and family.packing_kernels:
        _check_packing(args, family)


def _check_hub_kernels(args: TrainingArguments, family: Family) -> None:
    if not family.packing_kernels:
        raise ArgumentError(f"--use_hub_kernels has no effect: {family.title} has no linear attention; remove it")
    missing = [] if is_kernels_available() else ["a compatible version of the package kernels"]
    missing += ["a GPU"] if args.use_cpu else []
    if missing:
        raise ArgumentError(
            f"--use_hub_kernels: {' and '.join(missing)} not found (pip install -e '.[hub-kernels]'); remove the "
            "option, or install the kernels themselves (pip install -e '.[linear]')"
        )


def _check_packing(args: TrainingArguments, family: Family) -> None:
    lacking = [named for module, named in family.packing_kernels.items() if importlib.util.find_spec(module) is None]
    missing = [*lacking, *(["a GPU"] if args.use_cpu else [])]
    if missing:
        raise ArgumentError(
            f"--packing {args.packing}: not available for {family.title} here: without the kernels of "
            f"{' and '.join(family.packing_kernels.values())} its linear attention layers leak state between the "
            f"samples of a row, and {' and '.join(missing)} not found. Install the kernels (pip install -e "
            "'.[linear]'), download them (--use_hub_kernels true), or use --packing off, with "
            "--train_sampling_strategy batch_rebalance for samples of different lengths"
        )


def is_planned(args: TrainingArguments) -> bool:
    """Whether batches depend on the lengths of the samples."""
    return args.packing != "off" or args.train_sampling_strategy in BY_SIZE


def planned_loader(
    dataset: Measured, args: TrainingArguments, accelerator: Accelerator, collate: Collate, order: SamplerEpochCallback
) -> DataLoader:
    """The training dataloader of this rank; a collective call of all ranks.

    Args:
        dataset: the training data.
        args: the flags; --packing and --train_sampling_strategy choose the sampler.
        accelerator: accelerator of the Trainer.
        collate: the collator, for packs one that returns a single row.
        order: callback that gets the sampler, to set its epoch.

    Raises:
        DataError: a sample that cannot be used and is not skipped.
    """
    sizes = measure(
        dataset.sample_policy,
        rank=args.process_index,
        world=args.world_size,
        workers=args.dataloader_num_workers,
        gather=lambda part: gather_object([part]),
    )
    seed = args.seed if args.data_seed is None else args.data_seed
    options = loader_options(args) | {"collate_fn": collate}
    if args.packing == "off" and args.train_sampling_strategy == "group_by_length":
        size = args.per_device_train_batch_size
        lengths: list[int] = sizes.tokens.tolist()
        order.sampler = SeededLengthGroupedSampler(size * args.gradient_accumulation_steps, lengths, seed)
        options |= {"batch_size": size, "sampler": order.sampler, "drop_last": args.dataloader_drop_last}
        return accelerator.prepare(DataLoader(dataset, **options))  # pyright: ignore[reportArgumentType]
    if args.packing == "off":
        sampler: Any = _rebalanced(sizes, args, seed)
    else:
        sampler = order.sampler = RankPackSampler(_plan(sizes, args, seed), args.process_index)
    # These samplers are per rank: accelerate must not shard their batches again.
    return prepare_data_loader(
        DataLoader(dataset, batch_sampler=sampler, **options),  # pyright: ignore[reportArgumentType]
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        non_blocking=accelerator.non_blocking,
    )


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """DataLoader arguments from the ``--dataloader_*`` flags."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }


def _rebalanced(sizes: SampleLengths, args: TrainingArguments, seed: int) -> BatchRebalanceSampler:
    return BatchRebalanceSampler(
        lengths=sizes.tokens.tolist(),
        effective_batch_size=_batch(args),
        dp_size=args.world_size,
        grad_accum=args.gradient_accumulation_steps,
        seed=seed,
        rank=args.process_index,
        drop_last=args.dataloader_drop_last,
    )


def _batch(args: TrainingArguments) -> int:
    """Samples per optimizer step without packing."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def _plan(sizes: SampleLengths, args: TrainingArguments, seed: int) -> PackPlan:
    capacity = row_capacity(args)
    options = PackingOptions(capacity=capacity, most_items=args.packing_items, world=args.world_size, seed=seed)
    accumulation = args.gradient_accumulation_steps
    if args.packing == "batch":
        shuffle = args.train_sampling_strategy == "random"
        plan: PackPlan = BatchPlan(sizes, options, batch=_batch(args), accumulation=accumulation, shuffle=shuffle)
    else:
        plan = BestFitPlan(sizes, options, _epochs(sizes, options, args))
    if args.process_index == 0:
        _describe(plan, sizes, options, args)
    return plan


def _describe(plan: PackPlan, sizes: SampleLengths, options: PackingOptions, args: TrainingArguments) -> None:
    full, waiting = fill(plan, sizes, options)
    steps = max(math.ceil(len(plan) / args.gradient_accumulation_steps), 1)
    logger.info(
        "packing %s: %d samples in rows of at most %d tokens, %.1f%% full; %.1f samples per optimizer step (without "
        "packing %d), %d steps per epoch; the slowest rank has %.1f%% more work than the mean",
        args.packing, len(sizes), options.capacity, 100 * full, len(sizes) / steps, _batch(args), steps,
        100 * (waiting - 1),
    )  # fmt: skip


def _epochs(sizes: SampleLengths, options: PackingOptions, args: TrainingArguments) -> int:
    """Upper bound of the number of epochs, at least one."""
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    # No epoch has fewer packs than this.
    rounds = max(math.ceil(int(sizes.tokens.sum()) / options.capacity / options.world), 1)
    return math.ceil(args.max_steps * args.gradient_accumulation_steps / rounds)
