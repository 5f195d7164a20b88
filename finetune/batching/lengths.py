"""The size of every sample, known before any medium is decoded: packs and rounds are planned from it."""

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

# Below, starting processes takes longer than measuring.
_MANY = 2_000
_CHUNK = 64
_LEFT_OUT = ExampleSize(tokens=1, items=0, patches=0)
"""What a sample that is left out takes: the padding token in its place."""


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
        """(n,) length of the ids."""
        return self.table[:, 0]

    @property
    def items(self) -> np.ndarray:
        """(n,) thumbnails, slices and frames."""
        return self.table[:, 1]

    @property
    def cost(self) -> np.ndarray:
        """(n,) work of a training step on each sample, in tokens."""
        tokens, _, patches, frames = self.table.T
        return ExampleSize(tokens, 0, patches, frames).cost  # pyright: ignore[reportArgumentType, reportReturnType]


def measure(
    intake: SamplePolicy,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    gather: Callable[[np.ndarray], list[np.ndarray]] = lambda part: [part],
) -> SampleLengths:
    """Sizes of the samples as training takes them, made fit and left out by the policies of the run.

    The ranks divide the work; the result is remembered by the state of the data files, not of the media in them: where
    an image was replaced by one of another size, packs become a little shorter or longer than planned.

    Args:
        intake: the data set and its policies.
        rank: of this process.
        world: processes, which must all call this.
        workers: processes that measure, per rank.
        gather: the parts of all ranks, in their order.

    Raises:
        DataError: a sample that cannot be used and is not left out.
    """
    file = _file(intake)
    known = None if intake.remeasure or file is None else _read(file, len(intake.samples))
    # Ranks on other machines may not share the cache.
    if all(len(part) for part in gather(np.zeros(0 if known is None else 1))) and known is not None:
        return SampleLengths(known)
    table = np.zeros((len(intake.samples), 4), np.int32)
    mine = _measured(intake, range(rank, len(table), world), workers, quiet=rank > 0)
    for number, part in enumerate(gather(mine)):
        table[number::world] = part
    if file is not None and rank == 0:
        _write(file, table)
    return SampleLengths(table)


class _Measures(Dataset[tuple[int, int, int, int]]):
    """Sizes by sample number, for loader processes."""

    def __init__(self, intake: SamplePolicy, numbers: Sequence[int]) -> None:
        self.intake, self.numbers = intake, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, int, int, int]:
        found = _size(self.intake, self.numbers[index])
        return found.tokens, found.items, found.patches, found.frames


def _size(intake: SamplePolicy, index: int) -> ExampleSize:
    try:
        fitted = intake.fitter.fit(intake.samples[index])
    except DataError as error:
        if not intake.leaves_out(error):
            raise
        return _LEFT_OUT
    return intake.fitter.encoder.measured(fitted.sample, fitted.plans, fitted.rendered)


def _measured(intake: SamplePolicy, numbers: Sequence[int], workers: int, quiet: bool) -> np.ndarray:
    loader = DataLoader(
        _Measures(intake, numbers),
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


def _file(intake: SamplePolicy) -> Path | None:
    """Where the sizes are remembered; nowhere for samples that come from no file, or one that cannot be read."""
    data = getattr(intake.samples, "files", [])
    if not data or not all(path.is_file() for path in data):
        return None
    state = [list(signature(path)) for path in data]
    key = json.dumps([state, str(Path.cwd()), intake.on_bad_sample, fingerprint(intake.fitter, intake.samples)])
    return folder() / f"sizes-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _read(file: Path, count: int) -> np.ndarray | None:
    try:
        table = np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        return None  # absent, or cut short
    return table if table.shape == (count, 4) else None


def _write(file: Path, table: np.ndarray) -> None:
    try:
        with atomic_write(file) as opened:
            np.save(opened, table)
    except OSError as error:
        logger.warning("the sizes of the samples are not remembered: %s", error)
