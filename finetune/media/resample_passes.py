"""The two passes of a resize: numba code whose inner steps are LLVM's vectors of fixed length.

LLVM does not find these steps in a loop. It cuts the vectors to those of the processor, so any processor runs them.
Addresses and pitches of the steps are in bytes and are not checked. All of it stands in one module, as numba's cache
on disk knows a changed function by its module alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from finetune.media.numba_compiled import compiled

SIDE = 16
"""Rows and columns of a block: no side of what is resized may be shorter."""
PIXEL = 4
"""Bytes of a pixel."""
BITS = 22
"""Fixed-point precision of weights: that of Pillow, whose sums of 22-bit weights times bytes fit 32 bits."""

_LONG, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_INTS, _BYTES = ir.VectorType(_INT, SIDE), ir.VectorType(_BYTE, SIDE)


@compiled
def horizontal(
    source: np.ndarray, found: np.ndarray, weights: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> None:
    """Horizontal pass, (h, w) uint32 to (h, new w), all sides at least 16: 16 rows at a time are transposed.

    Then a column is 64 bytes that are summed together. Where a side is no multiple of 16, the last blocks overlap.
    """
    height, width = source.shape
    columns, block = np.empty((width, SIDE), np.uint32), np.empty((SIDE, SIDE), np.uint32)
    first, second, line = source.ctypes.data, found.ctypes.data, SIDE * PIXEL
    for row in range(0, height, SIDE):
        top = min(row, height - SIDE)
        for column in range(0, width, SIDE):
            left = min(column, width - SIDE)
            at = first + top * source.strides[0] + left * PIXEL
            _transpose(at, source.strides[0], columns.ctypes.data + left * line, line)
        for column in range(0, len(starts), SIDE):
            left = min(column, len(starts) - SIDE)
            for number in range(SIDE):
                place = left + number
                summed = columns.ctypes.data + starts[place] * line
                factors = weights.ctypes.data + place * weights.strides[0]
                _weighted_sum(summed, line, factors, counts[place], block.ctypes.data + number * line)
            _transpose(block.ctypes.data, line, second + top * found.strides[0] + left * PIXEL, found.strides[0])


@compiled
def vertical(
    source: np.ndarray, pitch: int, found: np.ndarray, weights: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> None:
    """Vertical pass of rows of at least 16 pixels, ``pitch`` pixels apart, to (new h, w) uint32; w as in the source."""
    width = found.shape[1]
    for place in range(len(starts)):
        row = source.ctypes.data + starts[place] * pitch * PIXEL
        factors, into = weights.ctypes.data + place * weights.strides[0], found.ctypes.data + place * found.strides[0]
        for column in range(0, width, SIDE):
            left = min(column, width - SIDE) * PIXEL
            _weighted_sum(row + left, pitch * PIXEL, factors, counts[place], into + left)


def _transpose_code(typing: Any, source: Any, pitch: Any, into: Any, into_pitch: Any) -> Any:
    del typing, source, pitch, into, into_pitch

    def generate(context: Any, builder: ir.IRBuilder, kind: Any, values: Any) -> Any:
        del kind
        source, pitch, into, into_pitch = values
        rows = [_load(builder, _row(builder, source, pitch, number), _INTS) for number in range(SIDE)]
        # In blocks of 2 x 2, then 4 x 4, 8 x 8 and 16 x 16, two opposite quarters change places.
        for half in (1, 2, 4, 8):
            for number in (number for number in range(SIDE) if not number & half):
                rows[number], rows[number + half] = _swap(builder, rows[number], rows[number + half], half)
        for number, row in enumerate(rows):
            _store(builder, row, _row(builder, into, into_pitch, number))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _weighted_sum_code(typing: Any, source: Any, pitch: Any, weights: Any, count: Any, into: Any) -> Any:
    del typing, source, pitch, weights, count, into

    def generate(context: Any, builder: ir.IRBuilder, kind: Any, values: Any) -> Any:
        del kind
        *rows, into = values
        for part, total in enumerate(_sums(builder, *rows)):
            _store(builder, _rounded(builder, total), builder.add(into, _LONG(part * SIDE)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


_transpose: Any = intrinsic(_transpose_code)
"""Transposes 16 x 16 pixels: address of the first row, pitch, address of the first row written, pitch there."""
_weighted_sum: Any = intrinsic(_weighted_sum_code)
"""Adds up rows of 16 pixels, each times its weight, and rounds and clips the sums to bytes.

Address of the first row, pitch, address of the int32 weights, number of rows (at least 1), address of what is written.
"""


def _sums(builder: ir.IRBuilder, source: Any, pitch: Any, weights: Any, count: Any) -> list[Any]:
    """Four sums of 16 lanes each, with a half added; they stay in registers from row to row."""
    before, loop, after = builder.block, builder.append_basic_block("rows"), builder.append_basic_block("rounding")
    builder.branch(loop)
    builder.position_at_end(loop)
    half = ir.Constant(_INTS, [1 << (BITS - 1)] * SIDE)
    number, address = builder.phi(_LONG), builder.phi(_LONG)
    sums = [builder.phi(_INTS) for _ in range(PIXEL)]
    weight = _spread(builder, _load(builder, _row(builder, weights, _LONG(4), number), _INT))
    totals = []
    for part, total in enumerate(sums):
        row = _load(builder, builder.add(address, _LONG(part * SIDE)), _BYTES)
        totals.append(builder.add(total, builder.mul(builder.zext(row, _INTS), weight)))
    following, below = builder.add(number, _LONG(1)), builder.add(address, pitch)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    phis = [(number, _LONG(0), following), (address, source, below)]
    for phi, first, then in [*phis, *((total, half, then) for total, then in zip(sums, totals, strict=True))]:
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    builder.position_at_end(after)
    return totals


def _rounded(builder: ir.IRBuilder, total: Any) -> Any:
    """16 sums as bytes, those below 0 or above 255 clipped."""
    value = builder.ashr(total, ir.Constant(_INTS, [BITS] * SIDE))
    for sign, limit in (("<", 0), (">", 255)):
        edge = ir.Constant(_INTS, [limit] * SIDE)
        value = builder.select(builder.icmp_signed(sign, value, edge), edge, value)
    return builder.trunc(value, _BYTES)


def _swap(builder: ir.IRBuilder, upper: Any, lower: Any, half: int) -> tuple[Any, Any]:
    """Two rows with the right halves of the upper row's blocks and the left halves of the lower row's exchanged."""
    masks = (
        [SIDE + place - half if place & half else place for place in range(SIDE)],
        [SIDE + place if place & half else place + half for place in range(SIDE)],
    )
    first, second = (builder.shuffle_vector(upper, lower, ir.Constant(_INTS, mask)) for mask in masks)
    return first, second


def _spread(builder: ir.IRBuilder, value: Any) -> Any:
    """A number in all 16 lanes."""
    nothing = ir.Constant(_INTS, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nothing, value, _INT(0)), nothing, ir.Constant(_INTS, [0] * SIDE)
    )


def _row(builder: ir.IRBuilder, address: Any, pitch: Any, number: Any) -> Any:
    return builder.add(address, builder.mul(pitch, _LONG(number) if isinstance(number, int) else number))


def _load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)
