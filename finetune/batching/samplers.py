"""The order of an epoch: which samples, packed how, at which time, on which rank."""

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
from finetune.batching.packing import Pack, Round, best_fit, deal, evened, rounds

_CHUNK = 4096
_INT32 = 2**31


def shuffled(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which accelerate takes ``count`` records in an epoch, (count,)."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator)
    return order.int() if count < _INT32 else order


class LeanSampler(SeedableRandomSampler):
    """The records in the very order of another sampler: 4 bytes for each, where that one keeps 40.

    Args:
        other: accelerate's sampler of an epoch, which makes a list of Python integers.
    """

    def __init__(self, other: SeedableRandomSampler) -> None:
        super().__init__(other.data_source, data_seed=other.initial_seed)
        self.epoch = other.epoch

    def __iter__(self) -> Generator[int, None, None]:
        for part in shuffled(len(self), self.initial_seed, self.epoch).split(_CHUNK):
            yield from part.tolist()
        self.set_epoch(self.epoch + 1)


class SeededLengths(LengthGroupedSampler):
    """Records of similar length next to each other, in an order that follows from seed and epoch.

    Args:
        batch_size: records that should be alike.
        lengths: tokens of every record.
        seed: of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        self._random = torch.Generator()
        super().__init__(batch_size, lengths=lengths, generator=self._random)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self._random.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class PackPlan(Protocol):
    """Packs of a whole training; the same on all ranks."""

    def __len__(self) -> int:
        """Rounds of an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[Round]:
        """The rounds of an epoch: every sample once."""
        ...


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """What packs are made for.

    Attributes:
        capacity: most tokens of a row.
        most_items: most visual items of a row, None for no limit.
        world: ranks.
        seed: of all orders.
    """

    capacity: int
    most_items: int | None
    world: int
    seed: int


class BestFitPlan:
    """Rows as full as they can be, packed anew for every epoch, in rounds of similar cost.

    Every epoch has as many rounds as the one that needs most.

    Args:
        sizes: of the samples.
        shape: of the packs.
        epochs: how many there will be.
    """

    def __init__(self, sizes: SampleLengths, shape: PackShape, epochs: int) -> None:
        self.sizes, self.shape = sizes, shape
        self._cost = sizes.cost
        most = max(len(self._packs(number)) for number in range(max(epochs, 1)))
        self._length = -(-most // shape.world)

    def __len__(self) -> int:
        return self._length

    def _packs(self, number: int) -> list[Pack]:
        order = shuffled(len(self.sizes), self.shape.seed, number).numpy()
        return best_fit(self.sizes.tokens, self.sizes.items, order, self.shape.capacity, self.shape.most_items)

    def epoch(self, number: int) -> Iterator[Round]:
        """The rounds of an epoch: every sample once."""
        packs = evened(self._packs(number), self._cost, self._length * self.shape.world)
        return iter(rounds(packs, self._cost, self.shape.world, (self.shape.seed, number)))


class BatchPlan:
    """The samples of every optimizer step as without packing, dealt to the ranks by their work and laid into rows.

    Args:
        sizes: of the samples.
        shape: of the packs.
        batch: samples per optimizer step, over all ranks.
        accumulation: micro-batches per optimizer step.
        shuffle: in random order, or as they come.
    """

    def __init__(self, sizes: SampleLengths, shape: PackShape, *, batch: int, accumulation: int, shuffle: bool) -> None:
        self.sizes, self.shape, self.batch, self.accumulation = sizes, shape, batch, accumulation
        self.shuffle = shuffle
        self._cost = sizes.cost

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.batch) * self.accumulation

    def epoch(self, number: int) -> Iterator[Round]:
        """The rounds of an epoch: every sample once."""
        order = shuffled(len(self.sizes), self.shape.seed, number) if self.shuffle else torch.arange(len(self.sizes))
        for samples in order.split(self.batch):
            count = self.shape.world * self.accumulation
            packs = deal(samples.tolist(), self._cost, count, self.sizes.tokens, self.shape.capacity)
            for start in range(0, count, self.shape.world):
                yield packs[start : start + self.shape.world]


class RankPacks(Sampler[list[int]]):
    """The packs of one rank, one per micro-batch.

    Args:
        plan: of all ranks.
        rank: of this process.
    """

    def __init__(self, plan: PackPlan, rank: int) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        for each in self.plan.epoch(self.epoch):
            yield each[self.rank]


class EpochOrder(TrainerCallback):
    """Tells a sampler its epoch: that of a resumed epoch lies under wrappers that the Trainer does not look through."""

    def __init__(self) -> None:
        self.sampler: LeanSampler | SeededLengths | RankPacks | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called before the loader is asked for the first batch of an epoch, resumed ones included."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def fill(plan: PackPlan, sizes: SampleLengths, shape: PackShape) -> tuple[float, float]:
    """What a plan makes of its first epoch.

    Returns:
        Share of the capacity of all packs that holds samples; sum over rounds of the largest work of a rank, divided
        by that of the mean.
    """
    cost, tokens = sizes.cost, sizes.tokens
    first = list(plan.epoch(0))
    work = np.array([[cost[pack].sum() for pack in each] for each in first])
    packs = sum(1 for each in first for pack in each if pack)
    used = sum(int(tokens[pack].sum()) for each in first for pack in each)
    return used / (packs * shape.capacity), float(work.max(1).sum() / work.mean(1).sum())
