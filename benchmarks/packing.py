"""Packing efficiency and rank imbalance, computed from sample lengths alone: ``python benchmarks/packing.py``.

20 000 samples with pictures from the web, documents, screenshots and photos of phones, cut as 2.5 cuts them, and texts
of different lengths; the sizes are drawn, no picture is made. Compared are rows of 4096 tokens with batches padded to
their longest sample, and the work of 8 ranks (tokens and a tenth per patch) with batches drawn at random, one sample
per rank as in the published scripts, and with the samplers of transformers: group_by_length and batch_rebalance, eight
samples per rank, with the same lengths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from results import append
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices

from finetune.batching.lengths import SampleLengths
from finetune.batching.samplers import BatchPlan, BestFitPlan, PackingOptions, PackPlan, fill
from finetune.media.slicing import SliceSpec, item_sizes, plan

SAMPLES, QUERIES, CAPACITY, RANKS, BATCH = 20_000, 96, 4096, 8, 8
SPEC = SliceSpec(max_slice_nums=9, scale_resolution=448, patch_size=14)
# Share of the samples, mean width and height, how far sizes scatter (standard deviation of their logarithm).
KINDS = ((0.55, 640, 480, 0.35), (0.2, 1000, 1400, 0.25), (0.15, 1920, 1080, 0.2), (0.1, 3000, 4000, 0.2))
_TEXT_MEDIAN, _TEXT_SPREAD, _TEXT_MOST = 160, 0.8, 1_500


def drawn(count: int) -> SampleLengths:
    """Sizes of so many samples."""
    draw = np.random.default_rng(0)
    table = np.zeros((count, 4), np.int32)
    kinds = draw.choice(len(KINDS), count, p=[kind[0] for kind in KINDS])
    for row, kind in zip(table, kinds, strict=True):
        _, width, height, spread = KINDS[kind]
        sides = np.maximum(np.array([width, height]) * np.exp(draw.normal(0, spread, 2)), 28).astype(int)
        items = item_sizes(plan(int(sides[0]), int(sides[1]), SPEC))
        text = min(int(_TEXT_MEDIAN * np.exp(draw.normal(0, _TEXT_SPREAD))) + 8, _TEXT_MOST)
        row[0] = text + len(items) * (QUERIES + 2) + 4
        row[1] = len(items)
        row[2] = sum(w * h for w, h in items) // SPEC.patch_size**2
    return SampleLengths(table)


def waiting(rounds: Sequence[Sequence[float]]) -> float:
    """Sum over rounds of the work of the slowest rank, by that of the mean."""
    work = np.array(rounds)
    return float(work.max(1).sum() / work.mean(1).sum())


def of_plan(planned: PackPlan, sizes: SampleLengths, shape: PackingOptions) -> tuple[float, float]:
    """Share of the rows that holds samples, and ``waiting``, over an epoch in which every sample is checked to be."""
    seen = [sample for each in planned.epoch(0) for pack in each for sample in pack]
    assert sorted(seen) == list(range(len(sizes)))
    return fill(planned, sizes, shape)


def _in_turn(batches: Sequence[Sequence[int]], work: np.ndarray) -> float:
    """``waiting`` when ranks take batches in turn."""
    whole = len(batches) // RANKS * RANKS
    sums = [float(work[list(batch)].sum()) for batch in batches[:whole]]
    return waiting(np.array(sums).reshape(-1, RANKS).tolist())


def _padded_work(batches: Sequence[Sequence[int]], sizes: SampleLengths) -> np.ndarray:
    """Work of every batch when its rows are padded to the longest."""
    rows = np.array([len(batch) * sizes.tokens[batch].max() for batch in batches], float)
    return rows + np.array([(sizes.cost[batch] - sizes.tokens[batch]).sum() for batch in batches])


def rebalanced(sizes: SampleLengths) -> list[list[list[int]]]:
    """Batches of all ranks of transformers' batch_rebalance, round by round."""
    lengths = sizes.tokens.tolist()
    ranks = [
        list(BatchRebalanceSampler(lengths, BATCH * RANKS, RANKS, 1, rank=rank, drop_last=True))
        for rank in range(RANKS)
    ]
    return [list(each) for each in zip(*ranks, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures and adds the goals among them to results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    dry = parser.parse_args(argv).dry
    sizes = drawn(SAMPLES)
    order = np.random.default_rng(1).permutation(SAMPLES)
    print(f"{SAMPLES} samples, mean {sizes.tokens.mean():.0f} tokens, {sizes.items.mean():.1f} slices")
    shape = PackingOptions(capacity=CAPACITY, most_items=None, world=RANKS, seed=0)
    full, ours = of_plan(BestFitPlan(sizes, shape, 1), sizes, shape)
    batches = np.split(order, SAMPLES // 4)
    padded = sum(int(sizes.tokens[batch].sum()) for batch in batches) / sum(
        len(batch) * int(sizes.tokens[batch].max()) for batch in batches
    )
    random = _in_turn([[sample] for sample in order], sizes.cost)
    wide = PackingOptions(capacity=BATCH * 2048, most_items=None, world=RANKS, seed=0)
    dealt = of_plan(BatchPlan(sizes, wide, batch=BATCH * RANKS, accumulation=1, shuffle=True), sizes, wide)[1]
    rounds = rebalanced(sizes)
    flat = [batch for each in rounds for batch in each]
    theirs = waiting(_padded_work(flat, sizes).reshape(-1, RANKS).tolist())
    grouped = get_length_grouped_indices(sizes.tokens.tolist(), BATCH, generator=torch.Generator().manual_seed(0))
    alike = [grouped[start : start + BATCH] for start in range(0, SAMPLES // BATCH // RANKS * BATCH * RANKS, BATCH)]
    by_length = waiting(_padded_work(alike, sizes).reshape(-1, RANKS).tolist())
    waits = "slowest rank / mean"
    rows = [
        (f"pack fill at {CAPACITY} tokens", 100 * full, 100 * padded, full / padded, "% full, batches of 4 padded"),
        (f"rank imbalance, {RANKS} ranks", ours, random, random / ours, f"{waits}, batch 1 at random"),
        (f"rank imbalance, {RANKS} ranks, batch_rebalance", ours, theirs, theirs / ours, waits),
        (f"rank imbalance, {RANKS} ranks, group_by_length", ours, by_length, by_length / ours, waits),
        (f"rank imbalance, {RANKS} ranks, --packing batch", dealt, theirs, theirs / dealt, f"{waits}, batch_rebalance"),
    ]  # fmt: skip
    for case, a, b, ratio, unit in rows:
        print(f"{case:<50} {a:9.4f} {b:9.4f} {ratio:7.3f}  {unit}")
    if not dry:
        append("packing", rows, ["transformers", "numpy"])


if __name__ == "__main__":
    main()
