"""Samplers: shuffling, length grouping and packing per epoch and rank, all reproducible from seed and epoch."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from finetune.batching.lengths import SampleLengths
from finetune.batching.packing import Pack, Round, balanced_packs, best_fit, rounds, split_to_count

_CHUNK = 4096
_INT32 = 2**31


def shuffled(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation that accelerate's ``SeedableRandomSampler`` uses in an epoch, (count,)."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator)
    return order.int() if count < _INT32 else order


class CompactRandomSampler(SeedableRandomSampler):
    """The order of accelerate's ``SeedableRandomSampler`` with 4 bytes per record instead of 40.

    Args:
        other: the sampler that it replaces, which builds a list of Python integers.
    """

    def __init__(self, other: SeedableRandomSampler) -> None:
        super().__init__(other.data_source, data_seed=other.initial_seed)
        self.epoch = other.epoch

    def __iter__(self) -> Generator[int, None, None]:
        for part in shuffled(len(self), self.initial_seed, self.epoch).split(_CHUNK):
            yield from part.tolist()
        self.set_epoch(self.epoch + 1)


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """transformers' ``LengthGroupedSampler`` with an order that depends only on seed and epoch.

    Args:
        batch_size: number of neighbouring records of similar length.
        lengths: tokens of every record.
        seed: random seed of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        self._random = torch.Generator()
        super().__init__(batch_size, lengths=lengths, generator=self._random)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self._random.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class PackPlan(Protocol):
    """The packs of all epochs; the same on all ranks."""

    def __len__(self) -> int:
        """Number of rounds (micro-steps) of an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[Round]:
        """The rounds of an epoch; every sample occurs once."""
        ...


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """How samples are packed into rows.

    Attributes:
        capacity: maximum number of tokens of a row.
        most_items: maximum number of visual items of a row, None for no limit.
        world: number of ranks.
        seed: random seed of all orders.
    """

    capacity: int
    most_items: int | None
    world: int
    seed: int


class BestFitPlan:
    """``--packing best_fit``: rows filled by best-fit packing, repacked every epoch, in rounds of similar cost.

    All epochs have the same number of rounds, that of the epoch that needs the most.

    Args:
        sizes: sizes of the samples.
        options: limits, ranks and seed.
        epochs: number of epochs.
    """

    def __init__(self, sizes: SampleLengths, options: PackingOptions, epochs: int) -> None:
        self.sizes, self.options = sizes, options
        self._cost = sizes.cost
        most = max(len(self._packs(number)) for number in range(max(epochs, 1)))
        self._length = -(-most // options.world)

    def __len__(self) -> int:
        return self._length

    def _packs(self, number: int) -> list[Pack]:
        order = shuffled(len(self.sizes), self.options.seed, number).numpy()
        return best_fit(self.sizes.tokens, self.sizes.items, order, self.options.capacity, self.options.most_items)

    def epoch(self, number: int) -> Iterator[Round]:
        """The rounds of an epoch; every sample occurs once."""
        packs = split_to_count(self._packs(number), self._cost, self._length * self.options.world)
        return iter(rounds(packs, self._cost, self.options.world, (self.options.seed, number)))


class BatchPlan:
    """``--packing batch``: the samples of every optimizer step as without packing, balanced over ranks by cost.

    Args:
        sizes: sizes of the samples.
        options: limits, ranks and seed.
        batch: samples per optimizer step, over all ranks.
        accumulation: micro-batches per optimizer step.
        shuffle: random order, or the order of the data.
    """

    def __init__(
        self, sizes: SampleLengths, options: PackingOptions, *, batch: int, accumulation: int, shuffle: bool
    ) -> None:
        self.sizes, self.options, self.batch, self.accumulation = sizes, options, batch, accumulation
        self.shuffle = shuffle
        self._cost = sizes.cost

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.batch) * self.accumulation

    def epoch(self, number: int) -> Iterator[Round]:
        """The rounds of an epoch; every sample occurs once."""
        order = shuffled(len(self.sizes), self.options.seed, number) if self.shuffle else torch.arange(len(self.sizes))
        for samples in order.split(self.batch):
            count = self.options.world * self.accumulation
            packs = balanced_packs(samples.tolist(), self._cost, count, self.sizes.tokens, self.options.capacity)
            for start in range(0, count, self.options.world):
                yield packs[start : start + self.options.world]


class RankPackSampler(Sampler[list[int]]):
    """Batch sampler of one rank: one pack per micro-batch.

    Args:
        plan: the packs of all ranks.
        rank: rank of this process.
    """

    def __init__(self, plan: PackPlan, rank: int) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        for each in self.plan.epoch(self.epoch):
            yield each[self.rank]


class SamplerEpochCallback(TrainerCallback):
    """Sets the sampler's epoch; the Trainer does not reach it through its dataloader wrappers when it resumes."""

    def __init__(self) -> None:
        self.sampler: CompactRandomSampler | SeededLengthGroupedSampler | RankPackSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called before the first batch of an epoch, also of a resumed one."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def fill(plan: PackPlan, sizes: SampleLengths, options: PackingOptions) -> tuple[float, float]:
    """Statistics of the first epoch of a plan.

    Returns:
        Fraction of the capacity of all packs that is filled; sum over rounds of the largest cost of a rank, divided by
        the sum of the mean cost.
    """
    cost, tokens = sizes.cost, sizes.tokens
    first = list(plan.epoch(0))
    work = np.array([[cost[pack].sum() for pack in each] for each in first])
    packs = sum(1 for each in first for pack in each if pack)
    used = sum(int(tokens[pack].sum()) for each in first for pack in each)
    return used / (packs * options.capacity), float(work.max(1).sum() / work.mean(1).sum())
