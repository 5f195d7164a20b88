"""Which samples share a row, and which rows ranks take at the same time: numbers in, numbers out."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Pack = list[int]
Round = list[Pack]
"""The packs that all ranks train at the same time, one each."""

# Samples that are packed together: enough to fill rows, few enough for every epoch to mix other samples.
_WINDOW = 16_384
# Packs per rank among which those of similar cost are looked for.
_SIMILAR = 64


def best_fit(
    lengths: np.ndarray, items: np.ndarray, order: np.ndarray, capacity: int, most_items: int | None = None
) -> list[Pack]:
    """Samples in as few rows as the best-fit rule finds: the longest first, each where it leaves least room.

    Args:
        lengths: (n,) tokens per sample; one above the capacity gets a row of its own.
        items: (n,) visual items per sample; one above ``most_items`` gets a row of its own.
        order: sample numbers; neighbours come into the same rows, so that another order makes other rows.
        capacity: most tokens of a row.
        most_items: most visual items of a row; None for no limit.

    Returns:
        Every number of ``order`` once.
    """
    packs: list[Pack] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        packs += _fit(window.tolist(), lengths[window].tolist(), items[window].tolist(), capacity, most_items)
    return packs


def _fit(numbers: list[int], lengths: list[int], items: list[int], capacity: int, most: int | None) -> list[Pack]:
    """One window, the longest sample first."""
    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # tokens left and number of every pack that is not full, in this order
    free: list[int] = []  # items left, by pack
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
    """Packs in rounds of similar cost, so that no rank waits for another, in random order.

    Args:
        packs: a multiple of ``world``.
        cost: (n,) work per sample.
        world: ranks.
        seed: of the order.
    """
    draw = np.random.default_rng(list(seed))
    work = np.array([cost[pack].sum() for pack in packs])
    order = draw.permutation(len(packs))
    groups: list[np.ndarray] = []
    for start in range(0, len(order), world * _SIMILAR):
        window = order[start : start + world * _SIMILAR]
        groups += np.split(window[np.argsort(work[window], kind="stable")], len(window) // world)
    # Within a round the ranks are drawn too, or one of them would always have a little more to do.
    return [[packs[pack] for pack in draw.permutation(groups[number])] for number in draw.permutation(len(groups))]


def evened(packs: Sequence[Pack], cost: np.ndarray, count: int) -> list[Pack]:
    """Exactly ``count`` packs: those with most work are divided, and where nothing is left to divide, empty ones."""
    whole = [pack for pack in packs if len(pack) < 2]
    heap = [(-float(cost[pack].sum()), number, pack) for number, pack in enumerate(packs) if len(pack) > 1]
    heapq.heapify(heap)
    number = len(packs)
    while heap and len(whole) + len(heap) < count:
        for half in deal(heapq.heappop(heap)[2], cost, 2):
            number += 1
            if len(half) > 1:
                heapq.heappush(heap, (-float(cost[half].sum()), number, half))
            else:
                whole.append(half)
    made = whole + [pack for _, _, pack in heap]
    return made + [[] for _ in range(count - len(made))]


def deal(
    samples: Sequence[int],
    cost: np.ndarray,
    count: int,
    lengths: np.ndarray | None = None,
    capacity: int | None = None,
) -> list[Pack]:
    """Samples in ``count`` packs of similar work, the most work first.

    Args:
        samples: their numbers.
        cost: (n,) work per sample.
        count: of packs; some are empty when there are fewer samples.
        lengths: (n,) tokens per sample, with ``capacity``.
        capacity: a pack takes no sample that brings it above so many tokens while another can take it.
    """
    packs: list[Pack] = [[] for _ in range(count)]
    tokens = [0] * count
    heap = [(0.0, number) for number in range(count)]
    for sample in sorted(samples, key=lambda each: -cost[each]):
        length = 0 if lengths is None else int(lengths[sample])
        full = []
        while capacity is not None and heap and tokens[heap[0][1]] + length > capacity:
            full.append(heapq.heappop(heap))
        if not heap:  # it fits nowhere: then where fewest tokens are
            full.sort(key=lambda entry: tokens[entry[1]])
            heap.append(full.pop(0))
        work, number = heapq.heappop(heap)
        packs[number].append(sample)
        tokens[number] += length
        for entry in [*full, (work + float(cost[sample]), number)]:
            heapq.heappush(heap, entry)
    return sorted(packs, key=lambda pack: -float(cost[pack].sum()))
