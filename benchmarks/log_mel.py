"""Log-mel features of a sound, padded by a window against padded to 30 s: ``python benchmarks/log_mel.py``.

Theirs is transformers' Whisper feature extractor as the published processors call it: every clip is filled up with
zeros to 30 s, and what belongs to the zeros is cut off afterwards. Ours is what sample preparation computes. One
thread, both sides in turn; the median of the CPU times counts, and any bit that differs ends the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from results import Row, append
from transformers import WhisperFeatureExtractor

from finetune.encoding.log_mel import log_mel
from finetune.media.audio_layout import AudioSpec

CASE, GOAL = "log-mel features of 1 s", 10.0
SECONDS = (1, 5, 15, 30)


def theirs(extractor: Any, samples: np.ndarray, spec: AudioSpec) -> torch.Tensor:
    """The features (bins, T) of a clip, computed of 30 s."""
    given = extractor(samples, sampling_rate=spec.rate, padding="max_length", return_tensors="pt")
    return given["input_features"][0, :, : spec.frames(len(samples))].clone()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="runs of either side with every clip")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    spec, extractor, chance = AudioSpec(pool_step=2), WhisperFeatureExtractor(), np.random.default_rng(0)
    rows: list[Row] = []
    for seconds in SECONDS:
        samples = chance.normal(0, 0.1, seconds * spec.rate).astype(np.float32)
        if not torch.equal(log_mel(samples, spec)[0], theirs(extractor, samples, spec)):
            raise SystemExit(f"the features of {seconds} s differ")
        sides = {"ours": lambda s=samples: log_mel(s, spec), "theirs": lambda s=samples: theirs(extractor, s, spec)}
        ours, other = _medians(sides, given.rounds)
        rows.append((f"log-mel features of {seconds} s", ours, other, other / ours, "ms of CPU time per clip"))
    for case, ours, other, ratio, unit in rows:
        print(f"{case:<40} {ours:>9.3f} {other:>9.3f} {ratio:>8.2f}  {unit}")
    if not given.dry:
        append("log_mel", rows, ["torch", "transformers", "numpy"])
    return 0 if all(ratio >= GOAL for case, _, _, ratio, _ in rows if case == CASE) else 1


def _medians(sides: dict[str, Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of CPU time of every side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            start = time.process_time()
            work()
            times[side].append(1000 * (time.process_time() - start))
    return [statistics.median(each) for each in times.values()]


if __name__ == "__main__":
    sys.exit(main())
