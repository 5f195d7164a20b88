"""Sample preprocessing, this toolkit against the published code: ``python benchmarks/samples.py``.

The mix is 11 photos of 640x480, 2 of 1344x1344, 2 screenshots of 1920x1080 (PNG) and 1 photo of 12 megapixels, each
with a question and an answer of some 400 tokens in all, for MiniCPM-Llama3-V 2.5 (96 placeholders, at most 9 slices).
Both sides run in turn on one thread, theirs in this process as training does it there, ours in another one with the
settings of our dataloader workers (finetune/utils/malloc.py); of the CPU time of every sample the median of the
rounds counts. Ids, labels, bounds and pixels of both sides are compared, those of --image_backend fast too; any
difference ends the run.

``--official DIR`` takes the vendor's finetune folder (its dataset.py) for the other side, not our re-creation of it.
"""

from __future__ import annotations

import os

# Before torch and tokenizers are loaded: one thread on both sides.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mix
import torch
import vendor
from official_samples import OfficialSamples, conversation_to_ids, strips, with_placeholders
from results import OFFICIAL, Row, append
from transformers import PreTrainedTokenizerFast

from dataset import SupervisedDataset
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.text_inputs import text_tensors
from finetune.families import by_name
from finetune.media.slicing import SlicePlan
from finetune.readers.mixture import open_data
from finetune.utils.malloc import keep_freed_memory

Job = Callable[[], Any]
IDENTICAL, FAST, TEXT = (
    "sample preparation, {}, identical",
    "sample preparation, {}, --image_backend fast",
    "text side, {}",
)
# A turn of a side, in runs and in seconds of CPU time: its process has waited, and the first runs are slow. As turns of
# both sides last equally long, that is as large a part of both.
_RUNS, _TURN = 3, 0.1
GOALS = {IDENTICAL.format("mix"): 4.5, FAST.format("mix"): 4.5, TEXT.format("mix"): 25.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the vendor's finetune folder")
    parser.add_argument("--rounds", type=int, default=5, help="turns that every side has with every sample")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = mix.write(Path(folder))
        bench = Bench(Path(folder) / "data.json", mix.tokenizer(), given.official)
        bench.compare()
        # What is loaded by now is not searched again and again by the garbage collector, on neither side.
        gc.collect()
        gc.freeze()
        bench.part()
        rows: list[Row] = [*_rows(bench, numbers, given.rounds)]
    if given.official is not None:
        rows = [(f"{case}, {OFFICIAL}", ours, theirs, ratio, unit) for case, ours, theirs, ratio, unit in rows]
    for case, ours, theirs, ratio, unit in rows:
        print(f"{case:<60} {ours:>9.3f} {theirs:>9.3f} {ratio:>8.2f}  {unit}")
    if not given.dry:
        append("samples", rows, ["torch", "pillow", "numba", "simplejpeg", "transformers", "tokenizers"])
    return 0 if all(row[3] >= GOALS.get(row[0].removesuffix(f", {OFFICIAL}"), 0) for row in rows) else 1


class Bench:
    """Both sides over the same records.

    Args:
        data: data.json of the mix.
        tokenizer: of both sides.
        official: the vendor's finetune folder; None for the re-creation.
    """

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerFast, official: Path | None) -> None:
        self._tokenizer = tokenizer
        self._records = json.loads(data.read_text(encoding="utf-8"))
        self._theirs = OfficialSamples(self._records, tokenizer)
        self._their_ids = lambda turns: conversation_to_ids(turns, tokenizer)
        if official is not None:
            self._theirs, self._their_ids = vendor.load(official, self._records, tokenizer)
        self._samples = open_data(data, None)
        family = by_name("llama3_v2_5")
        self._encoder = Encoder(family, tokenizer, mix.CONFIG)
        self._ours = SupervisedDataset(self._samples, self._encoder)
        self._fast = SupervisedDataset(self._samples, Encoder(family, tokenizer, mix.CONFIG, image_backend="fast"))

    def part(self) -> None:
        """Our side goes into a process of its own, as it is now."""
        here, there = multiprocessing.get_context("fork").Pipe()
        multiprocessing.get_context("fork").Process(target=self._serve, args=(there,), daemon=True).start()
        self._pipe = here

    def _serve(self, pipe: Connection) -> None:
        keep_freed_memory()
        while True:
            side, number = pipe.recv()
            pipe.send(_timed(self._job(side, number)))

    def times(self, side: str, number: int) -> list[float]:
        """Milliseconds of CPU time of a sample on a side, of all runs of a turn."""
        if side.startswith("their"):
            return _timed(self._job(side, number))
        self._pipe.send((side, number))
        return self._pipe.recv()

    @cache  # noqa: B019 - one bench per run
    def _job(self, side: str, number: int) -> Job:
        """The preparation of a sample, or its text side: ids, labels, positions, bounds; image sizes are known."""
        whole = {"theirs": self._theirs, "ours": self._ours, "fast": self._fast}
        if side in whole:
            return lambda: whole[side][number]
        sample = self._samples[number]
        plans = self._encoder.plans(self._encoder.sizes(sample))
        assert isinstance(plans[0], SlicePlan)
        if side == "our text":
            return lambda: text_tensors(self._encoder.render(sample, plans))
        turns = with_placeholders(self._records[number]["conversations"], plans[0].grid)
        return lambda: self._their_ids(turns)

    def compare(self) -> None:
        """Stops at any difference."""
        for number in range(len(self._records)):
            theirs = self._theirs[number]
            for ours in (self._ours[number], self._fast[number]):
                _check_text(theirs, ours)
                _check_pixels(theirs, ours)
        print(f"ids, labels, bounds and pixels of {len(self._records)} samples are identical")


def _check_text(theirs: Mapping[str, Any], ours: Example) -> None:
    ids = theirs["input_ids"].long()
    # The vendor's targets stand one place earlier: its loss does not shift them.
    shifted = torch.cat([torch.tensor([-100]), theirs["labels"].long()[:-1]])
    pairs = {
        "ids": (ids, ours.input_ids),
        "labels": (shifted, ours.labels),
        "position ids": (theirs["position_ids"], ours.position_ids),
        "bounds": (theirs["image_bound"], ours.image_bound),
        "sizes": (theirs["tgt_sizes"].long(), ours.tgt_sizes),
    }
    if unequal := [name for name, (one, other) in pairs.items() if not torch.equal(one, other)]:
        raise SystemExit(f"{ours.source}: {', '.join(unequal)} differ")


def _check_pixels(theirs: Mapping[str, Any], ours: Example) -> None:
    """Bit for bit: our bytes normalised as the network does it, in the vendor's layout."""
    pairs = zip(strips(ours), theirs["pixel_values"], strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise SystemExit(f"{ours.source}: pixels differ")


def _rows(bench: Bench, numbers: Mapping[str, Sequence[int]], rounds: int) -> list[Row]:
    every = [number for each in numbers.values() for number in each]
    taken = {
        number: _median_times(bench, ("theirs", "ours", "fast", "their text", "our text"), number, rounds)
        for number in every
    }
    rows: list[Row] = []
    for case, ours, theirs in (
        (IDENTICAL, "ours", "theirs"),
        (FAST, "fast", "theirs"),
        (TEXT, "our text", "their text"),
    ):
        groups = {"mix": every} | {name: list(each) for name, each in numbers.items()}
        for name, group in groups.items():
            our, their = (statistics.mean(taken[number][side] for number in group) for side in (ours, theirs))
            rows.append((case.format(name), our, their, their / our, "ms of CPU time per sample"))
    return rows


def _median_times(bench: Bench, sides: Sequence[str], number: int, rounds: int) -> dict[str, float]:
    """The median of all runs of a sample; the sides take turns."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            times[side] += bench.times(side, number)
    return {side: statistics.median(each) for side, each in times.items()}


def _timed(job: Job) -> list[float]:
    found: list[float] = []
    while len(found) < _RUNS or sum(found) < 1000 * _TURN:
        start = time.process_time()
        job()
        found.append(1000 * (time.process_time() - start))
    return found


if __name__ == "__main__":
    sys.exit(main())
