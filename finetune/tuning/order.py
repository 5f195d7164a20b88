"""The order of an epoch, in a tenth of the memory."""

from __future__ import annotations

from collections.abc import Generator

import torch
from accelerate.data_loader import SeedableRandomSampler

_CHUNK = 4096
_INT32 = 2**31


class LeanSampler(SeedableRandomSampler):
    """The records in the very order of another sampler: 4 bytes for each, where that one keeps 40.

    Args:
        other: accelerate's sampler of an epoch, which makes a list of Python integers.
    """

    def __init__(self, other: SeedableRandomSampler) -> None:
        super().__init__(other.data_source, data_seed=other.initial_seed)
        self.epoch = other.epoch

    def __iter__(self) -> Generator[int, None, None]:
        generator = torch.Generator()
        generator.manual_seed(self.initial_seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        if len(self) < _INT32:
            order = order.int()
        for part in order.split(_CHUNK):
            yield from part.tolist()
        self.set_epoch(self.epoch + 1)
