import ast
import doctest
import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.media import slicing
from finetune.media.slicing import SlicePlan, SliceSpec, crop_boxes, item_sizes, plan

SIDE = st.integers(1, 12_000)


def test_worked_examples() -> None:
    result = doctest.testmod(slicing)
    assert result.attempted >= 6
    assert result.failed == 0


@settings(deadline=None, max_examples=300)
@given(SIDE, SIDE, st.integers(1, 40), st.sampled_from([112, 224, 448]), st.sampled_from([8, 14]))
def test_properties(width: int, height: int, most: int, side: int, patch: int) -> None:
    cuts = plan(width, height, SliceSpec(most, side, patch))
    sizes = item_sizes(cuts)
    assert len(sizes) == cuts.items <= most + 1
    assert all(length % patch == 0 and length >= patch for size in sizes for length in size)
    if cuts.grid is None:
        assert (cuts.refined, cuts.slice, crop_boxes(cuts)) == (None, None, [])
        assert most == 1 or width * height <= side * side
        return
    columns, rows = cuts.grid
    assert width * height > side * side
    assert columns * rows == cuts.items - 1 >= 2
    assert cuts.refined is not None
    assert cuts.slice is not None
    assert (cuts.slice[0] * columns, cuts.slice[1] * rows) == cuts.refined
    boxes = crop_boxes(cuts)
    assert len(boxes) == columns * rows
    assert boxes[0][:2] == (0, 0)
    assert boxes[-1][2:] == cuts.refined
    # Row by row, without gap or overlap.
    assert [(box[0], box[1]) for box in boxes] == [
        (column * cuts.slice[0], row * cuts.slice[1]) for row in range(rows) for column in range(columns)
    ]
    assert all((right - left, low - top) == cuts.slice for left, top, right, low in boxes)


@settings(deadline=None, max_examples=100)
@given(SIDE, SIDE)
def test_a_taller_image_is_not_cut_into_more_columns(width: int, height: int) -> None:
    grid = plan(width, height, SliceSpec(9, 448, 14)).grid
    if grid and width > 2 * height:
        assert grid[0] > grid[1]
    if grid and height > 2 * width:
        assert grid[1] > grid[0]


def test_thumbnail_larger_than_position_table() -> None:
    assert plan(10, 2000, SliceSpec(9, 448, 14)) == SlicePlan((28, 6328))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_no_side_below_one(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="both sides must be at least 1"):
        plan(*size, SliceSpec(9, 448, 14))


def test_geometry_needs_no_pixels() -> None:
    tree = ast.parse(inspect.getsource(slicing))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert sorted(names) == ["__future__", "collections.abc", "dataclasses", "itertools", "math", "typing"]
