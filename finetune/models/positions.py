"""Position embeddings of vision towers and resamplers: bucketed ids, interpolated tables, 2-D and 1-D sine-cosine.

Tables are computed when needed: a model has no buffers that checkpoint files do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Sizes = Sequence[tuple[int, int]]


def _buckets(count: int, side: int) -> torch.Tensor:
    """The (count,) bucket of each of ``count`` evenly spaced positions on a table with ``side`` entries.

    The float32 arithmetic of the published code: the step is a float32 reciprocal, and neither ``arange(n) / n`` nor
    integer division gives the same ids for all lengths (25, 49, 50, 55, 58, ... differ).
    """
    step = (1 / torch.tensor(count, dtype=torch.float32, device="cpu")).item()
    fractions = torch.arange(0, 1 - 1e-6, step, dtype=torch.float32, device="cpu")
    boundaries = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
    return torch.bucketize(fractions, boundaries, right=True)


def _joined(sizes: Sizes, of_size: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Concatenates ``of_size(rows, columns)`` of every item; called once per distinct size."""
    by_size = {size: of_size(*size) for size in dict.fromkeys(sizes)}
    return torch.cat([by_size[size] for size in sizes])


def row_ids(sizes: Sizes, side: int) -> torch.Tensor:
    """Rows of the position table, (patches,) int64, by the rule of MiniCPM-Llama3-V 2.5.

    Its published code treats an item of h x w patches as one row of h * w, so only the first row of the table is used.
    """
    return _joined(sizes, lambda height, width: _buckets(height * width, side))


def grid_ids(sizes: Sizes, side: int) -> torch.Tensor:
    """Rows of the position table, (patches,) int64, by the two-dimensional rule (2.6 and later)."""
    return _joined(
        sizes,
        lambda height, width: (_buckets(height, side)[:, None] * side + _buckets(width, side)[None, :]).flatten(),
    )


POSITION_IDS: dict[str, Callable[[Sizes, int], torch.Tensor]] = {"row": row_ids, "grid": grid_ids}


def resampled(table: torch.Tensor, sizes: Sizes, grid: tuple[int, int]) -> torch.Tensor:
    """A learned (1, rows * columns, D) table of ``grid`` rows, columns interpolated to the size of each item.

    Bicubic with antialiasing in float32, once per distinct size (V-2.0).

    Returns:
        (patches, D), in the dtype of ``table``.
    """
    # Only V-2.0 needs timm, and importing it takes a second.
    from timm.layers.pos_embed import resample_abs_pos_embed

    def resized(height: int, width: int) -> torch.Tensor:
        return resample_abs_pos_embed(table, [height, width], old_size=list(grid), num_prefix_tokens=0)[0]

    return _joined(sizes, resized)


def _sincos_of(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """(n, dim) float32: the sines, then the cosines, of float32 positions (n,) at dim / 2 frequencies."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32, device=positions.device) / (dim // 2))
    angles = positions[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos(sizes: Sizes, dim: int, device: torch.device) -> torch.Tensor:
    """Two-dimensional sine-cosine positions, (patches, dim) float32, items concatenated, row by row.

    The first half of the channels encodes the column, the second the row (the published order). The value at (row,
    column) does not depend on the size of the grid.
    """
    longest = max(max(size) for size in sizes)
    axis = _sincos_of(torch.arange(longest, dtype=torch.float32, device=device), dim // 2)

    def crossed(height: int, width: int) -> torch.Tensor:
        columns, rows = axis[None, :width].expand(height, -1, -1), axis[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=2).flatten(0, 1)

    return _joined(sizes, crossed)


def sincos_times(times: Sequence[int], dim: int) -> torch.Tensor:
    """One-dimensional sine-cosine positions of time indices, (items, dim) float32; zeros for stills (-1).

    Computed on the CPU: large time indices amplify differences of the frequencies in the last bit between devices.
    """
    indices = torch.tensor(times, dtype=torch.float32, device="cpu")
    return _sincos_of(indices, dim) * (indices >= 0)[:, None]
