"""Bicubic resizing of 8-bit pixels, bit-identical to Pillow, in vectorized numba code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import PIL
from numpy.lib.stride_tricks import as_strided

from finetune.media.numba_compiled import compiled
from finetune.media.resample_passes import BITS, PIXEL, SIDE, horizontal, vertical

Size = tuple[int, int]

PILLOW_13 = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether Pillow is 13 or newer: other order of the two passes, and Arrow import and export."""


def vertical_first(old: Size, new: Size) -> bool:
    """Whether Pillow makes the vertical pass first; sizes are (width, height). Rounding in between makes it matter."""
    if old[1] <= new[1]:
        return False
    return old[1] - new[1] > 2 * (old[0] - new[0]) if PILLOW_13 else old[1] > 100 * old[0]


def resize_widths(pixels: np.ndarray, widths: Sequence[int], found: np.ndarray) -> None:
    """Horizontal resizes of (height, old width, 4) uint8 to several widths, side by side in (height, sum, 4)."""
    source, target = _padded(pixels), found if min(found.shape[:2]) >= SIDE else _padded(found)
    tables = _side_by_side([_weights(pixels.shape[1], width) for width in widths], target.shape[1])
    horizontal(_frozen(source.view(np.uint32)[..., 0]), target.view(np.uint32)[..., 0], *tables)
    if target is not found:
        found[:] = target[: found.shape[0], : found.shape[1]]


def resize_width(pixels: np.ndarray, width: int) -> np.ndarray:
    """Horizontal resize of (height, old width, 4) uint8 to (height, width, 4)."""
    if width == pixels.shape[1]:
        return pixels
    found = np.empty((len(pixels), width, 4), np.uint8)
    resize_widths(pixels, [width], found)
    return found


def resize_height(pixels: np.ndarray, height: int) -> np.ndarray:
    """Vertical resize of (old height, width, 4) uint8 to (height, width, 4)."""
    if height == len(pixels):
        return pixels
    width = pixels.shape[1]
    source = pixels if width >= SIDE else _padded(pixels)
    found = np.empty((height, source.shape[1], 4), np.uint8)
    vertical(*pixel_run(source), found.view(np.uint32)[..., 0], *_weights(len(pixels), height))
    return found[:, :width]


def pixel_run(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory of (height, width, 4) uint8 from first to last pixel as (n,) uint32, and the row pitch in pixels.

    Read-only like Pillow's memory, so that numba compiles one signature only.
    """
    pitch = pixels.strides[0] // PIXEL
    length = (pixels.shape[0] - 1) * pitch + pixels.shape[1]
    return as_strided(pixels.view("<u4"), (length,), (PIXEL,), writeable=False), pitch


def _padded(pixels: np.ndarray) -> np.ndarray:
    """A contiguous array with zeros at the right and below where a side is shorter than that of a block."""
    rows, columns = (max(SIDE - side, 0) for side in pixels.shape[:2])
    return np.pad(pixels, ((0, rows), (0, columns), (0, 0))) if rows or columns else np.ascontiguousarray(pixels)


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view, like Pillow's memory, so that numba compiles one signature only."""
    view = array.view()
    view.flags.writeable = False
    return view


def _side_by_side(tables: Sequence[tuple[np.ndarray, ...]], columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tables of several widths as one, with zeros for the columns that are left."""
    weights = np.zeros((columns, max(each.shape[1] for each, _, _ in tables)), np.int32)
    starts, counts = np.zeros(columns, np.int32), np.ones(columns, np.int32)
    first = 0
    for some, begin, length in tables:
        part = slice(first, first + len(some))
        weights[part, : some.shape[1]], starts[part], counts[part] = some, begin, length
        first = part.stop
    return weights, starts, counts


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
            weights[place, tap] = int(weight * (1 << BITS) + (-0.5 if weight < 0 else 0.5))
        starts[place], counts[place] = start, count
    return weights, starts, counts
