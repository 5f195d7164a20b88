"""Image slicing plans: thumbnail size, slice grid and slice sizes by image size (no pixels, no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Box = tuple[int, int, int, int]
"""Region of an image: left, top, right, bottom in pixels."""
UpsizeRule = Callable[[Box], int | None]
"""Gives for a region the side in pixels of the square whose area it is upscaled to; None for no upscaling."""
Enlarging = Literal["always", "never", "adaptive"]
"""Whether images smaller than ``scale_resolution`` squared are upscaled; "adaptive" decides by the pixels."""

MERGES = {"16x": 4, "4x": 2}
"""Patches per side that are merged into one token, by downsample_mode (4.6 and later)."""


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """Slicing settings of a checkpoint.

    Attributes:
        max_slice_nums: maximum number of slices besides the thumbnail; 1 means the thumbnail alone.
        scale_resolution: side in pixels of the square whose area a slice should have.
        patch_size: side in pixels of a vision patch.
        merge: patches per side that are merged into one token; sides are multiples of ``merge * patch_size``.
        enlarge: upscaling of images (with "adaptive" also slices) smaller than ``scale_resolution`` squared.
    """

    max_slice_nums: int
    scale_resolution: int
    patch_size: int
    merge: int = 1
    enlarge: Enlarging = "always"


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """The slices of one image. Sizes are (width, height) in pixels, the grid is (columns, rows).

    Attributes:
        thumbnail: size of the resized whole image.
        grid: columns and rows, None when the image is not sliced.
        refined: size of the resized image that is cut into slices, or None.
        slice: size of each slice, or None.
        own: size of every slice, row by row, if some are smaller than ``slice``; else None.
    """

    thumbnail: tuple[int, int]
    grid: tuple[int, int] | None = None
    refined: tuple[int, int] | None = None
    slice: tuple[int, int] | None = None
    own: tuple[tuple[int, int], ...] | None = None

    @property
    def items(self) -> int:
        """Number of visual items: the thumbnail and one per slice."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


def plan(width: int, height: int, spec: SliceSpec, upsize: UpsizeRule | None = None) -> SlicePlan:
    """The slice plan of an image of the given size.

    An image larger than ``scale_resolution`` squared is cut into about area / ``scale_resolution`` ** 2 slices, in the
    grid with the nearest aspect ratio; the whole image is always kept as a thumbnail. Rule and rounding are those of
    the published MiniCPM-V code; for images that are not upscaled, those of MiniCPM-OCR.

    >>> nine = SliceSpec(max_slice_nums=9, scale_resolution=448, patch_size=14)
    >>> plan(448, 448, nine)
    SlicePlan(thumbnail=(448, 448), grid=None, refined=None, slice=None, own=None)
    >>> plan(640, 480, nine)
    SlicePlan(thumbnail=(518, 392), grid=(2, 1), refined=(728, 546), slice=(364, 546), own=None)
    >>> plan(1080, 1920, nine).items
    9

    Args:
        width: in pixels, after EXIF orientation.
        height: in pixels, after EXIF orientation.
        spec: slicing settings of the checkpoint.
        upsize: upscaling by the pixels; needed for "adaptive" only.

    Raises:
        ValueError: a side below 1, or ``upsize`` given without "adaptive" or missing with it.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be sliced; both sides must be at least 1")
    squares = min(math.ceil(width * height / (spec.scale_resolution * spec.scale_resolution)), spec.max_slice_nums)
    if (spec.enlarge == "adaptive") != (upsize is not None):
        raise ValueError(f"enlarge {spec.enlarge!r} {'does not use' if upsize else 'needs'} the argument upsize")
    if squares <= 1:
        side = None if upsize is None else upsize((0, 0, width, height))
        return SlicePlan(_fit(width, height, spec) if spec.enlarge == "always" else _small(width, height, spec, side))
    grid = _best_grid(width, height, squares, spec.max_slice_nums)
    columns, rows = grid
    cell = _fit(_nearest(width, columns) / columns, _nearest(height, rows) / rows, spec)
    own = () if upsize is None else tuple(_own(box, cell, spec, upsize) for box in _cells(width, height, grid))
    return SlicePlan(
        thumbnail=_fit(width, height, spec),
        grid=grid,
        refined=(cell[0] * columns, cell[1] * rows),
        slice=cell,
        own=own if any(size != cell for size in own) else None,
    )


def item_sizes(cuts: SlicePlan) -> list[tuple[int, int]]:
    """(width, height) in pixels of every visual item: the thumbnail, then the slices row by row.

    >>> item_sizes(SlicePlan(thumbnail=(518, 392), grid=(2, 1), refined=(728, 546), slice=(364, 546)))
    [(518, 392), (364, 546), (364, 546)]
    """
    if cuts.slice is None:
        return [cuts.thumbnail]
    return [cuts.thumbnail, *(cuts.own or [cuts.slice] * (cuts.items - 1))]


def crop_boxes(cuts: SlicePlan) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each slice in the refined image, row by row.

    >>> crop_boxes(SlicePlan(thumbnail=(518, 392), grid=(2, 1), refined=(728, 546), slice=(364, 546)))
    [(0, 0, 364, 546), (364, 0, 728, 546)]
    """
    if cuts.grid is None or cuts.slice is None:
        return []
    columns, rows = cuts.grid
    width, height = cuts.slice
    return [
        (column * width, row * height, (column + 1) * width, (row + 1) * height)
        for row in range(rows)
        for column in range(columns)
    ]


def _cells(width: int, height: int, grid: tuple[int, int]) -> Iterator[Box]:
    """The region of the original image that each slice shows, row by row."""
    columns, rows = grid
    across = [round(width * column / columns) for column in range(columns + 1)]
    down = [round(height * row / rows) for row in range(rows + 1)]
    for top, bottom in pairwise(down):
        for left, right in pairwise(across):
            yield left, top, right, bottom


def _own(box: Box, cell: tuple[int, int], spec: SliceSpec, upsize: UpsizeRule) -> tuple[int, int]:
    """Size of the slice of this region: ``cell``, or a smaller one if the region needs no upscaling."""
    width, height = box[2] - box[0], box[3] - box[1]
    if min(width, height) < 1 or width * height > spec.scale_resolution**2:
        return cell
    side = upsize(box)
    size = cell if side == spec.scale_resolution else _small(width, height, spec, side)
    return size if math.prod(size) < math.prod(cell) else cell


def _small(width: int, height: int, spec: SliceSpec, side: int | None) -> tuple[int, int]:
    """The size of a region upscaled to a square of this side; with None it is only downscaled, if too large."""
    if side is None and width * height <= spec.scale_resolution**2:
        step = spec.patch_size * spec.merge
        return _nearest(width, step), _nearest(height, step)
    return _fit(width, height, replace(spec, scale_resolution=side or spec.scale_resolution))


def _fit(width: float, height: float, spec: SliceSpec) -> tuple[int, int]:
    """The size with about the same aspect ratio and the area of one square; sides are multiples of merged patches."""
    aspect = width / height
    # Truncate the height first, then compute the width from it: the order of the published code affects rounding.
    fitted = int(spec.scale_resolution / math.sqrt(aspect))
    step = spec.patch_size * spec.merge
    return _nearest(int(fitted * aspect), step), _nearest(fitted, step)


def _nearest(length: float, step: int) -> int:
    """The multiple of ``step`` nearest ``length``, at least ``step``; ties go to the even multiple (``round``)."""
    return max(round(length / step) * step, step)


def _best_grid(width: int, height: int, squares: int, most: int) -> tuple[int, int]:
    """(columns, rows) nearest the aspect ratio in log space; ties: fewer slices, then fewer columns."""
    aspect = math.log(width / height)
    best, best_error = (1, 1), math.inf
    for count in (squares - 1, squares, squares + 1):
        if count == 1 or count > most:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            error = abs(aspect - math.log(columns / rows))
            if error < best_error:
                best, best_error = (columns, rows), error
    return best
