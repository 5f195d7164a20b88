"""Grounding metrics: IoU of boxes, points in boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.evaluation.metrics.metric import Metric

Box = tuple[float, float, float, float]
Point = tuple[float, float]
# Thresholds reported by GUICourse.
THRESHOLDS = (0.2, 0.5, 0.7, 0.9)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_POINT = re.compile(r"<point>(.*?)</point>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_PAIR = re.compile(r"[(\[]\s*([-+]?\d+\.?\d*)\s*,\s*([-+]?\d+\.?\d*)\s*[)\]]")
_CORNERS, _COORDINATES = 4, 2


def boxes(text: str) -> list[Box]:
    """The boxes of a text, (left, top, right, bottom), in its own unit.

    ``<box>x1 y1 x2 y2</box>``, ``<box>(x1,y1),(x2,y2)</box>`` and ``<box>x1, y1, x2, y2</box>`` are read; tags
    without exactly four numbers are ignored.
    """
    numbers = ([float(value) for value in _NUMBER.findall(inner)] for inner in _BOX.findall(text))
    return [(found[0], found[1], found[2], found[3]) for found in numbers if len(found) == _CORNERS]


def points(text: str) -> list[Point]:
    """The points of a text: ``<point>x y</point>``, else the centres of its boxes, else pairs such as ``(x, y)``."""
    numbers = ([float(value) for value in _NUMBER.findall(inner)] for inner in _POINT.findall(text))
    found = [(values[0], values[1]) for values in numbers if len(values) == _COORDINATES]
    if not found:
        found = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes(text)]
    return found or [(float(x), float(y)) for x, y in _PAIR.findall(text)]


def iou(one: Box, other: Box) -> float:
    """Intersection over union; 0 when the boxes do not overlap or one has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = ((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return both / (sum(areas) - both)


def matched_iou(given: Sequence[Box], wanted: Sequence[Box]) -> float:
    """Sum of the IoU of greedily matched pairs (best first, each box once) over the larger number of boxes."""
    pairs = sorted(((iou(a, b), i, j) for i, a in enumerate(given) for j, b in enumerate(wanted)), reverse=True)
    total, used_given, used_wanted = 0.0, set(), set()
    for value, i, j in pairs:
        if i not in used_given and j not in used_wanted:
            used_given.add(i)
            used_wanted.add(j)
            total += value
    return total / max(len(given), len(wanted), 1)


def box_iou(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """IoU of the boxes, and the fraction of samples above 0.2, 0.5, 0.7 and 0.9 (acc@).

    IoU has no unit: 0-1000 and pixels give the same, as long as answer and reference use one. Of several boxes each
    counts once (``matched_iou``); of several references the best. Source: IoU (Jaccard) of PASCAL VOC (Everingham et
    al., 2010), the thresholds of GUICourse (Chen et al., 2024, arXiv 2406.11317), "above" as in its scorer.
    """
    given = boxes(prediction)
    value = max(matched_iou(given, boxes(reference)) for reference in references)
    return {"box_iou": value, **{f"acc@{limit}": float(value > limit) for limit in THRESHOLDS}}


def point_in_box(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """1 when the first point of the answer (or the centre of its first box) is in a box of a reference, edge included.

    Both in one unit. Source: the grounding accuracy of ScreenSpot (Cheng et al., 2024, arXiv 2401.10935).
    """
    given = points(prediction)
    hit = bool(given) and any(
        left <= given[0][0] <= right and top <= given[0][1] <= bottom
        for reference in references
        for left, top, right, bottom in boxes(reference)
    )
    return {"point_in_box": float(hit)}


BOX_IOU = Metric("box_iou", box_iou)
POINT_IN_BOX = Metric("point_in_box", point_in_box)
