"""Bicubic resizing of 8-bit pixels, bit-identical to Pillow, in vectorized numba code."""

from __future__ import annotations

import math

import numpy as np
import PIL
from numba import int32, njit, uint8

from finetune.media.numba_compiled import compiled

Size = tuple[int, int]

PILLOW_13 = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether Pillow is 13 or newer: other order of the two passes, and Arrow import and export."""

# Pillow's fixed-point precision: a sum of 22-bit weights times bytes fits 32 bits.
_BITS = 22
_HALF = 1 << (_BITS - 1)
# Block sizes that keep the working set in the L1 cache. Horizontal pass: rows at a time, their bytes, source columns at
# a time. Vertical pass: bytes of a row at a time.
_ROWS, _LANES, _COLUMNS = 16, 64, 512
_RUN = 512


def vertical_first(old: Size, new: Size) -> bool:
    """Whether Pillow makes the vertical pass first; sizes are (width, height). Rounding in between makes it matter."""
    if old[1] <= new[1]:
        return False
    return old[1] - new[1] > 2 * (old[0] - new[0]) if PILLOW_13 else old[1] > 100 * old[0]


def resize_width(pixels: np.ndarray, width: int, into: np.ndarray | None = None) -> np.ndarray:
    """Horizontal resize of (height, old width, 4) uint8 to (height, width, 4), written to ``into`` if given."""
    if width == pixels.shape[1] and into is None:
        return pixels
    found = np.empty((len(pixels), width, 4), np.uint8) if into is None else into
    source = np.ascontiguousarray(pixels).view(np.uint32)[..., 0]
    _horizontal(_frozen(source), found.view(np.uint32)[..., 0], *_weights(pixels.shape[1], width))
    return found


def resize_height(pixels: np.ndarray, height: int) -> np.ndarray:
    """Vertical resize of (old height, width, 4) uint8 to (height, width, 4)."""
    if height == len(pixels):
        return pixels
    width = pixels.shape[1]
    found = np.empty((height, width, 4), np.uint8)
    source = np.ascontiguousarray(pixels).reshape(-1, 4 * width)
    _vertical(_frozen(source), found.reshape(height, -1), *_weights(len(pixels), height))
    return found


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view, like Pillow's memory, so that numba compiles one signature only."""
    view = array.view()
    view.flags.writeable = False
    return view


@compiled
def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output position: fixed-point weights (new, taps) int32, first input position, and number of taps.

    Bicubic filter with a = -1/2 and antialiasing, in the same order of operations as Pillow.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support, squeeze = 2.0 * stretch, 1.0 / stretch
    weights = np.zeros((new, int(math.ceil(support)) * 2 + 1), np.int32)
    starts, counts = np.zeros(new, np.int32), np.zeros(new, np.int32)
    exact = np.zeros(weights.shape[1], np.float64)
    for place in range(new):
        center = (place + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), old) - start
        total = 0.0
        for tap in range(count):
            distance = abs((tap + start - center + 0.5) * squeeze)
            exact[tap] = 0.0
            if distance < 1.0:
                exact[tap] = ((-0.5 + 2.0) * distance - (-0.5 + 3.0)) * distance * distance + 1
            elif distance < 2.0:
                exact[tap] = (((distance - 5) * distance + 8) * distance - 4) * -0.5
            total += exact[tap]
        for tap in range(count):
            weight = exact[tap] / total if total != 0.0 else exact[tap]
            weights[place, tap] = int(weight * (1 << _BITS) + (-0.5 if weight < 0 else 0.5))
        starts[place], counts[place] = start, count
    return weights, starts, counts


@njit(inline="always")
def _byte(total):  # noqa: ANN001, ANN202 - compiled per type
    """Rounds and clips a fixed-point sum to a byte; branch-free and in 32 bits, so that it can be vectorized."""
    value = int32(total >> _BITS)
    value = int32(value & ~int32(value >> 31))
    return uint8(int32(value | int32(int32(255 - value) >> 31)))


@compiled
def _horizontal(
    source: np.ndarray, found: np.ndarray, weights: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> None:
    """Horizontal pass, (h, w) uint32 to (h, new w): 16 rows at a time are transposed and summed together."""
    height, width = source.shape
    new = len(starts)
    # Output columns per block, so that their input columns stay in the L1 cache for any image width.
    step = max(_COLUMNS * new // width - 4, 1)
    beside = np.zeros((_widest(starts, counts, step), _ROWS), np.uint32)
    lanes = beside.view(np.uint8)
    sums, line = np.zeros(_LANES, np.int32), np.zeros(_LANES, np.uint8)
    pixels = line.view(np.uint32)
    for top in range(0, height, _ROWS):
        rows = min(_ROWS, height - top)
        for first in range(0, new, step):
            last = min(first + step, new) - 1
            left, right = int(starts[first]), int(starts[last] + counts[last])
            _turn(source, top, rows, left, right, beside)
            for place in range(first, last + 1):
                _add_columns(lanes, starts[place] - left, weights[place, : counts[place]], sums)
                for lane in range(_LANES):
                    line[lane] = _byte(sums[lane])
                for row in range(rows):
                    found[top + row, place] = pixels[row]


@compiled
def _widest(starts: np.ndarray, counts: np.ndarray, step: int) -> int:
    """Maximum number of input positions of ``step`` neighbouring output positions."""
    widest = 0
    for first in range(0, len(starts), step):
        last = min(first + step, len(starts)) - 1
        widest = max(widest, starts[last] + counts[last] - starts[first])
    return widest


@njit(inline="always")
def _turn(source: np.ndarray, top: int, rows: int, left: int, right: int, beside: np.ndarray) -> None:
    if rows == _ROWS:
        for x in range(right - left):
            for row in range(_ROWS):
                beside[x, row] = source[top + row, left + x]
    else:
        for x in range(right - left):
            for row in range(rows):
                beside[x, row] = source[top + row, left + x]


@njit(inline="always")
def _add_columns(lanes: np.ndarray, start: int, weights: np.ndarray, sums: np.ndarray) -> None:
    for lane in range(_LANES):
        sums[lane] = _HALF
    tap = 0
    while tap + 4 <= len(weights):
        a, b, c, d = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
        at = start + tap
        for lane in range(_LANES):
            sums[lane] += (
                int32(lanes[at, lane]) * a
                + int32(lanes[at + 1, lane]) * b
                + int32(lanes[at + 2, lane]) * c
                + int32(lanes[at + 3, lane]) * d
            )
        tap += 4
    while tap < len(weights):
        a = weights[tap]
        for lane in range(_LANES):
            sums[lane] += int32(lanes[start + tap, lane]) * a
        tap += 1


@compiled
def _vertical(
    source: np.ndarray, found: np.ndarray, weights: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> None:
    """Vertical pass, (h, n) uint8 to (new h, n): every output row is a weighted sum of input rows."""
    length = source.shape[1]
    sums = np.zeros(_RUN, np.int32)
    for place in range(len(starts)):
        for left in range(0, length, _RUN):
            right = min(left + _RUN, length)
            _add_rows(source, starts[place], left, right, weights[place, : counts[place]], sums)
            into = found[place, left:right]
            for lane in range(right - left):
                into[lane] = _byte(sums[lane])


@njit(inline="always")
def _add_rows(source: np.ndarray, start: int, left: int, right: int, weights: np.ndarray, sums: np.ndarray) -> None:
    for lane in range(right - left):
        sums[lane] = _HALF
    tap = 0
    while tap + 4 <= len(weights):
        a, b, c, d = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
        at = start + tap
        one, two = source[at, left:right], source[at + 1, left:right]
        three, four = source[at + 2, left:right], source[at + 3, left:right]
        for lane in range(right - left):
            sums[lane] += int32(one[lane]) * a + int32(two[lane]) * b + int32(three[lane]) * c + int32(four[lane]) * d
        tap += 4
    while tap < len(weights):
        a, one = weights[tap], source[start + tap, left:right]
        for lane in range(right - left):
            sums[lane] += int32(one[lane]) * a
        tap += 1
