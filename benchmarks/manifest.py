"""Completing a checkpoint: ``python benchmarks/manifest.py``.

Files as two ranks with ZeRO-2 write them are written by two processes, flushed to disk, and described by a manifest.
The time of the manifest is compared with that of writing the bytes: as formats 1 and 2 made it (SHA-256, every rank
waits), and as it is made now (XXH3 in the background). What training waits for is then the start of the thread. The
hashing itself is measured alone and with a busy process per rank beside it, as training goes on meanwhile. The rounds
take turns; medians count.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from results import Row, append

from finetune.checkpoints import manifest
from finetune.checkpoints.background_manifest import BackgroundManifest

# Bytes of the files of a rank, of the whole: weights in 16 bit, fp32 master weights, two moments.
_SHARES = {"model-0000{}-of-00002.safetensors": 1, "global_step/zero_pp_rank_{}_optim_states.pt": 6}
_BLOCK = 1 << 24
# Of the time of writing the bytes.
_GOAL = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; the temporary folder without it")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    times: dict[str, list[float]] = {name: [] for name in ("write", "before", "hash", "beside", "wait")}
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for name, seconds in _round(Path(folder), given.gigabytes, hashed_first=number % 2 == 0).items():
                times[name].append(seconds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    what = f"{given.gigabytes:g} GB by two ranks"
    rows: list[Row] = [
        (f"{case}, {what}", median[our], median[their], median[their] / median[our], "s")
        for case, our, their in (
            ("waiting for the manifest", "wait", "before"),
            ("manifest and writing", "hash", "write"),
            ("manifest beside two busy ranks and writing", "beside", "write"),
            ("manifest before and writing", "before", "write"),
        )
    ]
    for row in rows:
        print(f"{row[0]:<62} {row[1]:>9.4f} {row[2]:>9.3f} {row[3]:>9.4g}  {row[4]}")
    if not given.dry:
        append("manifest", rows, ["xxhash"])
    return 0 if median["beside"] / median["write"] <= _GOAL else 1


def _round(folder: Path, gigabytes: float, *, hashed_first: bool) -> dict[str, float]:
    sizes = {name: round(share / sum(_SHARES.values()) * gigabytes * 1e9 / 2) for name, share in _SHARES.items()}
    (folder / "global_step").mkdir()
    times = {"write": _timed(lambda: _write_all(folder, sizes))}
    ways = {"before": lambda: _sha256(folder), "hash": lambda: manifest.write(folder, 1, _layout())}
    for name in sorted(ways, reverse=hashed_first):
        times[name] = _timed(ways[name])
    with _busy_ranks():
        times["beside"] = _timed(ways["hash"])
    background = BackgroundManifest()
    times["wait"] = _timed(lambda: background.start(folder, 1, _layout()))
    assert background.wait() is None
    return times


@contextmanager
def _busy_ranks() -> Iterator[None]:
    """Two processes that compute without a pause."""
    ranks = [multiprocessing.Process(target=_compute, daemon=True) for _ in range(2)]
    for process in ranks:
        process.start()
    try:
        yield
    finally:
        for process in ranks:
            process.terminate()
            process.join()


def _compute() -> None:
    values = np.ones((256, 256), np.float32)
    while True:
        values = np.clip(values @ values, 0, 1)


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write_all(folder: Path, sizes: dict[str, int]) -> None:
    ranks = [multiprocessing.Process(target=_write_rank, args=(folder, sizes, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0


def _write_rank(folder: Path, sizes: dict[str, int], rank: int) -> None:
    block = os.urandom(_BLOCK)
    for name, size in sizes.items():
        with (folder / name.format(rank + 1)).open("wb") as file:
            for start in range(0, size, _BLOCK):
                file.write(block[: size - start])
            file.flush()
            os.fsync(file.fileno())


def _sha256(folder: Path) -> None:
    """As format 2: the files one after another per thread, two at once on two cores."""
    from concurrent.futures import ThreadPoolExecutor

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(digest, [path for path in folder.rglob("*") if path.is_file()]))


def _layout() -> dict[str, Any]:
    fields = {"world_size": 2, "zero_stage": 2, "method": "full", "batch_size": 1, "accumulation": 1}
    return {**fields, "resumable": True}


if __name__ == "__main__":
    sys.exit(main())
