"""Disk cache of the reference model's log-probabilities of all pairs, and the batches it is filled from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from finetune.data_check.check_cache import fingerprint
from finetune.data_check.sample_hash import content_key
from finetune.encoding.example import Example
from finetune.encoding.sample_policy import SamplePolicy
from finetune.sample import DataError
from finetune.utils.cache import atomic_write, folder, signature

logger = logging.getLogger(__name__)


class ReferenceCache:
    """The cached table of one data set.

    Args:
        sample_policy: the data set and its policies.
        model: text that changes with the reference model and the way it computes.
    """

    def __init__(self, sample_policy: SamplePolicy, model: str) -> None:
        self._count = len(sample_policy.samples)
        key = hashlib.sha256(
            json.dumps([model, fingerprint(sample_policy.length_policy, sample_policy.samples)]).encode()
        )
        for state in _states(sample_policy):
            key.update(state)
        self.path = folder() / f"reference-{key.hexdigest()[:32]}.npy"

    def read(self) -> np.ndarray | None:
        """The table (n, 2) float32, of the chosen and the rejected answer; None if it is not cached."""
        try:
            table = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError):
            return None  # missing or truncated
        return table if table.shape == (self._count, 2) and table.dtype == np.float32 else None

    def write(self, table: np.ndarray) -> None:
        """Caches a table; if that fails, a warning is logged."""
        try:
            with atomic_write(self.path) as opened:
                np.save(opened, table)
        except OSError as error:
            logger.warning("the log-probabilities of the reference are not cached: %s", error)


def _states(sample_policy: SamplePolicy) -> Iterator[bytes]:
    """The state of every sample: its text, and its media files."""
    for index in range(len(sample_policy.samples)):
        try:
            sample = sample_policy.samples[index]
            files = [signature(path) for media in sample.media() for path in media.files if path.is_file()]
        except (DataError, OSError):
            yield b"unusable"
        else:
            yield json.dumps([content_key(sample), files]).encode()


class ReferenceExamples(Dataset[Example]):
    """The examples of a data set by number, without counting or reporting skipped ones.

    Args:
        sample_policy: the data set and its policies.
    """

    def __init__(self, sample_policy: SamplePolicy) -> None:
        self._policy = sample_policy

    def __len__(self) -> int:
        return len(self._policy.samples)

    def __getitem__(self, index: int) -> Example:
        policy, length_policy = self._policy, self._policy.length_policy
        try:
            return length_policy.encode(policy.samples[index])[0]
        except DataError as error:
            if not policy.skips(error):
                raise
            return length_policy.encoder.empty(str(policy.samples.source(index)))


def batches_of_rank(count: int, size: int, rank: int, world: int) -> list[list[int]]:
    """The sample numbers of each batch of a rank: as many batches on every rank, the last ones may be empty."""
    own = range(rank, count, world)
    rounds = -(-len(range(0, count, world)) // size)
    return [[*own[number * size : (number + 1) * size]] for number in range(rounds)]
