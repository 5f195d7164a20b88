"""Packing algorithms on sample numbers: best-fit packs, balanced packs, and packs of equal cost per micro-step."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Pack = list[int]
Round = list[Pack]
"""The packs of one micro-step, one per rank."""

# Samples per packing window: enough to fill rows, few enough that every epoch packs other samples together.
_WINDOW = 16_384
# Packs per rank that are sorted by cost to form rounds.
_SIMILAR = 64


def best_fit(
    lengths: np.ndarray, items: np.ndarray, order: np.ndarray, capacity: int, most_items: int | None = None
) -> list[Pack]:
    """Best-fit-decreasing packing: the longest sample first, each into the fullest row that has room.

    Args:
        lengths: (n,) tokens per sample; one above the capacity gets its own row.
        items: (n,) visual items per sample; one above ``most_items`` gets its own row.
        order: sample numbers, packed in windows of neighbours; another order gives other rows.
        capacity: maximum number of tokens of a row.
        most_items: maximum number of visual items of a row; None for no limit.

    Returns:
        Packs that have every number of ``order`` once.
    """
    packs: list[Pack] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        packs += _fit(window.tolist(), lengths[window].tolist(), items[window].tolist(), capacity, most_items)
    return packs


def _fit(numbers: list[int], lengths: list[int], items: list[int], capacity: int, most: int | None) -> list[Pack]:
    """Packs one window, whose samples are sorted by length, descending."""
    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack number) of all packs with room, sorted
    free: list[int] = []  # visual items left, by pack
    for number, length, count in zip(numbers, lengths, items, strict=True):
        place = bisect_left(room, (length, -1))
        while most is not None and place < len(room) and free[room[place][1]] < count:
            place += 1
        if place < len(room):
            left, pack = room.pop(place)
            packs[pack].append(number)
        else:
            left, pack = capacity, len(packs)
            packs.append([number])
            free.append(most or 0)
        free[pack] -= count
        if left > length:
            insort(room, (left - length, pack))
    return packs


def rounds(packs: Sequence[Pack], cost: np.ndarray, world: int, seed: Sequence[int]) -> list[Round]:
    """Groups packs of similar cost into rounds, so that ranks wait little for each other; rounds in random order.

    Args:
        packs: a multiple of ``world``.
        cost: (n,) cost per sample.
        world: number of ranks.
        seed: random seed of the order.
    """
    draw = np.random.default_rng(list(seed))
    work = np.array([cost[pack].sum() for pack in packs])
    order = draw.permutation(len(packs))
    groups: list[np.ndarray] = []
    for start in range(0, len(order), world * _SIMILAR):
        window = order[start : start + world * _SIMILAR]
        groups += np.split(window[np.argsort(work[window], kind="stable")], len(window) // world)
    # Ranks are shuffled within a round, or the last one would always have the most work.
    return [[packs[pack] for pack in draw.permutation(groups[number])] for number in draw.permutation(len(groups))]


def split_to_count(packs: Sequence[Pack], cost: np.ndarray, count: int) -> list[Pack]:
    """Exactly ``count`` packs: the most expensive ones are split in two, then empty packs are added."""
    single = [pack for pack in packs if len(pack) < 2]
    heap = [(-float(cost[pack].sum()), number, pack) for number, pack in enumerate(packs) if len(pack) > 1]
    heapq.heapify(heap)
    number = len(packs)
    while heap and len(single) + len(heap) < count:
        for half in balanced_packs(heapq.heappop(heap)[2], cost, 2):
            number += 1
            if len(half) > 1:
                heapq.heappush(heap, (-float(cost[half].sum()), number, half))
            else:
                single.append(half)
    made = single + [pack for _, _, pack in heap]
    return made + [[] for _ in range(count - len(made))]


def balanced_packs(
    samples: Sequence[int],
    cost: np.ndarray,
    count: int,
    lengths: np.ndarray | None = None,
    capacity: int | None = None,
) -> list[Pack]:
    """Distributes samples over ``count`` packs of similar cost (longest processing time first), most expensive first.

    Args:
        samples: sample numbers.
        cost: (n,) cost per sample.
        count: number of packs; some are empty when there are fewer samples.
        lengths: (n,) tokens per sample, needed with ``capacity``.
        capacity: maximum number of tokens of a pack, exceeded only if no pack has room.
    """
    packs: list[Pack] = [[] for _ in range(count)]
    tokens = [0] * count
    heap = [(0.0, number) for number in range(count)]
    for sample in sorted(samples, key=lambda each: -cost[each]):
        length = 0 if lengths is None else int(lengths[sample])
        full = []
        while capacity is not None and heap and tokens[heap[0][1]] + length > capacity:
            full.append(heapq.heappop(heap))
        if not heap:  # no pack has room: use the one with the fewest tokens
            full.sort(key=lambda entry: tokens[entry[1]])
            heap.append(full.pop(0))
        work, number = heapq.heappop(heap)
        packs[number].append(sample)
        tokens[number] += length
        for entry in [*full, (work + float(cost[sample]), number)]:
            heapq.heappush(heap, entry)
    return sorted(packs, key=lambda pack: -float(cost[pack].sum()))
