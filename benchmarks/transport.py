"""Transfer of a sample of ten slices from a dataloader worker: ``python benchmarks/transport.py``.

Both sides go through a DataLoader with one process and batches of one sample. The samples are finished before, so that
what is timed is the way alone: collating, sharing memory, and taking over in the main process. Theirs is what the
vendor's dataset class gives, a list of float32 tensors, one per slice; ours is the example of our encoder, its patches
as bytes. The loaders take turns, and the median of the wall time from one batch to the next counts.

``--official DIR`` takes the vendor's finetune folder (its dataset.py) for the other side, not our re-creation of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mix
import torch
import vendor
from official_samples import OfficialSamples, collate
from results import Row, append
from torch.utils.data import DataLoader, Dataset

from dataset import DataCollator, SupervisedDataset
from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.readers.mixture import open_data

CASE, GOAL = "transport of a 10-slice sample", 6.0
_CLASS = "1344x1344 jpg"
_BATCHES, _WARM = 16, 4


class Finished(Dataset[Any]):
    """Copies of a sample that are there already, each given once: what is sent lies in shared memory afterwards."""

    def __init__(self, sample: Any) -> None:
        self.samples = [copy.deepcopy(sample) for _ in range(_BATCHES + _WARM)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the vendor's finetune folder")
    parser.add_argument("--rounds", type=int, default=9, help="loaders per side")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    theirs, ours = _samples(given.official)
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(given.rounds):
        times["theirs"] += _intervals(theirs, collate)
        times["ours"] += _intervals(ours, DataCollator(0))
    our, their = statistics.median(times["ours"]), statistics.median(times["theirs"])
    row: Row = (CASE, our, their, their / our, "ms from batch to batch")
    print(f"{row[0]:<40} {row[1]:>9.3f} {row[2]:>9.3f} {row[3]:>8.2f}  {row[4]}")
    if not given.dry:
        append("transport", [row], ["torch"])
    return 0 if row[3] >= GOAL else 1


def _samples(official: Path | None) -> tuple[Any, Any]:
    """The sample of ten slices as the vendor's dataset gives it, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        number = mix.write(Path(folder), [_CLASS])[_CLASS][0]
        data = Path(folder) / "data.json"
        records: Sequence[Any] = json.loads(data.read_text(encoding="utf-8"))
        tokenizer = mix.tokenizer()
        dataset = OfficialSamples(records, tokenizer)
        if official is not None:
            dataset, _ = vendor.load(official, records, tokenizer)
        encoder = Encoder(by_name("llama3_v2_5"), tokenizer, mix.CONFIG)
        theirs, ours = dataset[number], SupervisedDataset(open_data(data, None), encoder)[number]
    if len(theirs["pixel_values"]) != len(ours.tgt_sizes) != 10:
        raise SystemExit(f"{len(theirs['pixel_values'])} and {len(ours.tgt_sizes)} slices, not 10")
    return theirs, ours


def _intervals(sample: Any, collator: Callable[[Any], Any]) -> list[float]:
    """Milliseconds from one batch to the next."""
    loader = DataLoader(Finished(sample), batch_size=1, num_workers=1, collate_fn=collator)
    arrived = []
    for _ in loader:
        arrived.append(time.perf_counter())
    return [1000 * (after - before) for before, after in zip(arrived[_WARM:], arrived[_WARM + 1 :], strict=False)]


if __name__ == "__main__":
    sys.exit(main())
