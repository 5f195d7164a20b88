"""Cuts the pixels of visual items (thumbnails and slices) into vision patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from finetune.media.numba_compiled import compiled
from finetune.media.resample import pixel_run


def patchify(items: Sequence[np.ndarray], patch_size: int) -> np.ndarray:
    """Patches of items (height, width, 4) without the fourth channel: (patches, 3 * P * P) uint8, P = ``patch_size``.

    Items one after another, patches of an item row by row, each patch in (channel, row, column) order.
    """
    grids = [(item.shape[0] // patch_size, item.shape[1] // patch_size) for item in items]
    patches = np.empty((sum(rows * columns for rows, columns in grids), 3, patch_size**2), np.uint8)
    start = 0
    for item, (rows, columns) in zip(items, grids, strict=True):
        stop = start + rows * columns
        _cutter(patch_size)(*pixel_run(item), columns, patches[start:stop])
        start = stop
    return patches.reshape(-1, 3 * patch_size**2)


@cache
def _cutter(side: int) -> Callable[[np.ndarray, int, int, np.ndarray], None]:
    """The compiled kernel for one patch size; constant loop lengths let it be vectorized."""

    @compiled
    def cut(pixels: np.ndarray, pitch: int, columns: int, patches: np.ndarray) -> None:
        square = np.empty(side * side, np.uint32)
        number = 0
        for top in range(0, len(patches) // columns * side, side):
            for left in range(0, columns * side, side):
                for row in range(side):
                    start = (top + row) * pitch + left
                    line = pixels[start : start + side]
                    for column in range(side):
                        square[row * side + column] = line[column]
                # The lowest byte of a pixel is its first channel.
                first, second, third = patches[number, 0], patches[number, 1], patches[number, 2]
                for place in range(side * side):
                    pixel = square[place]
                    first[place] = pixel
                    second[place] = pixel >> 8
                    third[place] = pixel >> 16
                number += 1

    return cut
