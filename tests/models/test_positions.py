"""Position embeddings against formulas written independently."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from finetune.models.positions import grid_ids, resampled, row_ids, sincos


def bucket(index: int, count: int, side: int = 70) -> int:
    """Plain integer division, right at all but a few lengths."""
    return side * index // count


def test_row_rule() -> None:
    """Lengths where the published float32 ids differ from integer division, as recorded from the official code."""
    differ = [n for n in range(1, 72) if row_ids([(1, n)], 70).tolist() != [bucket(i, n) for i in range(n)]]
    assert differ == [25, 49, 50, 55, 58]


def test_the_float32_step_matters() -> None:
    """Recorded: with a double step 232 of these lengths get other ids, with arange(n) / n 223."""
    boundaries = torch.arange(1 / 70, 1.0, 1 / 70)

    def differ(fractions: Callable[[int], torch.Tensor]) -> int:
        pairs = ((row_ids([(1, n)], 70), fractions(n)) for n in range(1, 1100))
        return sum(ours.tolist() != torch.bucketize(x, boundaries, right=True).tolist() for ours, x in pairs)

    assert differ(lambda n: torch.arange(0, 1 - 1e-6, 1 / n)) == 232
    assert differ(lambda n: torch.arange(n) / n) == 223


def test_row_rule_ignores_the_shape() -> None:
    assert row_ids([(8, 12)], 70).tolist() == row_ids([(1, 96)], 70).tolist()
    assert row_ids([(8, 12)], 70).tolist()[:9] == [0, 0, 1, 2, 2, 3, 4, 5, 5]


def test_grid_rule() -> None:
    ids = grid_ids([(3, 5), (2, 2)], 70).tolist()
    expected = [bucket(r, 3) * 70 + bucket(c, 5) for r in range(3) for c in range(5)]
    assert ids == expected + [bucket(r, 2) * 70 + bucket(c, 2) for r in range(2) for c in range(2)]


def test_sincos_is_columns_first_and_independent_of_the_grid() -> None:
    table = sincos([(3, 4), (7, 9)], 16, torch.device("cpu"))
    omega = [10000 ** (-k / 4) for k in range(4)]

    def expected(row: int, column: int) -> list[float]:
        values = []
        for position in (column, row):
            values += [math.sin(position * w) for w in omega] + [math.cos(position * w) for w in omega]
        return values

    assert table.shape == (12 + 63, 16)
    assert torch.allclose(table[1 * 4 + 3], torch.tensor(expected(1, 3)), atol=1e-6)
    assert torch.allclose(table[12 + 6 * 9 + 8], torch.tensor(expected(6, 8)), atol=1e-5)


def test_resampled_table_per_item() -> None:
    table = torch.randn(1, 25, 8, generator=torch.Generator().manual_seed(0))
    out = resampled(table, [(5, 5), (3, 7), (5, 5)], (5, 5))
    image = table.reshape(1, 5, 5, 8).permute(0, 3, 1, 2)
    resized = F.interpolate(image, (3, 7), mode="bicubic", antialias=True)
    assert torch.equal(out[:25], table[0])
    assert torch.equal(out[46:], table[0])
    assert torch.allclose(out[25:46], resized[0].flatten(1).T, atol=1e-6)
