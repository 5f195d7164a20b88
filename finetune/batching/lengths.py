"""Token and patch counts of every sample, computed in parallel without decoding media, and cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from finetune.data_check.check_cache import fingerprint
from finetune.encoding.example_size import ExampleSize
from finetune.encoding.sample_policy import SamplePolicy
from finetune.sample import DataError
from finetune.utils.cache import atomic_write, folder, signature

logger = logging.getLogger(__name__)

# With fewer samples, starting worker processes takes longer than measuring.
_MANY = 2_000
_CHUNK = 64
_SKIPPED = ExampleSize(tokens=1, items=0, patches=0)
"""Size of the empty example in place of a skipped sample."""


@dataclass(frozen=True, slots=True)
class SampleLengths:
    """Sizes of n samples.

    Attributes:
        table: (n, 4) int32: tokens, visual items, patches, mel frames.
    """

    table: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    @property
    def tokens(self) -> np.ndarray:
        """(n,) number of tokens."""
        return self.table[:, 0]

    @property
    def items(self) -> np.ndarray:
        """(n,) number of visual items: thumbnails, slices and frames."""
        return self.table[:, 1]

    @property
    def cost(self) -> np.ndarray:
        """(n,) relative compute of a training step on each sample, in tokens."""
        tokens, _, patches, frames = self.table.T
        return ExampleSize(tokens, 0, patches, frames).cost  # pyright: ignore[reportArgumentType, reportReturnType]


def measure(
    sample_policy: SamplePolicy,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    gather: Callable[[np.ndarray], list[np.ndarray]] = lambda part: [part],
) -> SampleLengths:
    """Sizes of all samples after the policies of the run.

    The work is sharded across ranks. The result is cached by the state of the data files, not of the media files: after
    an image is replaced by one of another size, packs are a little shorter or longer than planned.

    Args:
        sample_policy: the data set and its policies.
        rank: rank of this process.
        world: number of processes; a collective call of all.
        workers: worker processes per rank.
        gather: all-gather of an array, in the order of the ranks.

    Raises:
        DataError: a sample that cannot be used and is not skipped.
    """
    file = _file(sample_policy)
    known = None if sample_policy.remeasure or file is None else _read(file, len(sample_policy.samples))
    # Ranks on other machines may not share the cache.
    if all(len(part) for part in gather(np.zeros(0 if known is None else 1))) and known is not None:
        return SampleLengths(known)
    table = np.zeros((len(sample_policy.samples), 4), np.int32)
    mine = _measured(sample_policy, range(rank, len(table), world), workers, quiet=rank > 0)
    for number, part in enumerate(gather(mine)):
        table[number::world] = part
    if file is not None and rank == 0:
        _write(file, table)
    return SampleLengths(table)


class _Measures(Dataset[tuple[int, int, int, int]]):
    """Sizes by sample number, for dataloader workers."""

    def __init__(self, sample_policy: SamplePolicy, numbers: Sequence[int]) -> None:
        self.sample_policy, self.numbers = sample_policy, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, int, int, int]:
        found = _size(self.sample_policy, self.numbers[index])
        return found.tokens, found.items, found.patches, found.frames


def _size(sample_policy: SamplePolicy, index: int) -> ExampleSize:
    try:
        fitted = sample_policy.length_policy.fit(sample_policy.samples[index])
    except DataError as error:
        if not sample_policy.skips(error):
            raise
        return _SKIPPED
    return sample_policy.length_policy.size_of(fitted)


def _measured(sample_policy: SamplePolicy, numbers: Sequence[int], workers: int, quiet: bool) -> np.ndarray:
    loader = DataLoader(
        _Measures(sample_policy, numbers),
        batch_size=_CHUNK,
        num_workers=workers if len(numbers) >= _MANY else 0,
        collate_fn=np.array,
    )
    bar = tqdm(
        total=len(numbers),
        desc="measuring samples",
        unit="sample",
        delay=1,
        disable=quiet,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    parts = [np.zeros((0, 4), np.int32)]
    with bar:
        for part in loader:
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts).astype(np.int32)


def _file(sample_policy: SamplePolicy) -> Path | None:
    """The cache file; None for samples without files, or with unreadable ones."""
    data = sample_policy.samples.files
    if not data or not all(path.is_file() for path in data):
        return None
    state = [list(signature(path)) for path in data]
    key = json.dumps(
        [
            state,
            str(Path.cwd()),
            sample_policy.on_bad_sample,
            fingerprint(sample_policy.length_policy, sample_policy.samples),
        ]
    )
    return folder() / f"sizes-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _read(file: Path, count: int) -> np.ndarray | None:
    try:
        table = np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        return None  # missing or truncated
    return table if table.shape == (count, 4) else None


def _write(file: Path, table: np.ndarray) -> None:
    try:
        with atomic_write(file) as opened:
            np.save(opened, table)
    except OSError as error:
        logger.warning("the lengths of the samples are not cached: %s", error)
