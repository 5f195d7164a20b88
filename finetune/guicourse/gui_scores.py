"""GUICourse metrics: text and boxes of GUIEnv, actions of GUIAct.

Source: the paper (arXiv 2406.11317) and the scorer published with it (github.com/yiye3/GUICourse, evaluation/). Where
that scorer has no rule (go_back, go_home, task_impossible) an action is compared like enter: by its name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.metrics.boxes import THRESHOLDS, Box, boxes, iou
from finetune.evaluation.metrics.text import token_f1
from finetune.guicourse.actions import FIELDS, Action, from_label, read

# A tap counts within this distance, in fractions of width and height.
TAP_DISTANCE = 0.14
# Text counts above this F1, a selected region above this IoU.
_ENOUGH = 0.5
# A predicted box belongs to the element it covers best, above this IoU; else to the nearest.
_COVERS = 0.1
_THOUSAND = 1000

Elements = Sequence[Mapping[str, Any]]
Size = tuple[float, float]


class ElementsMissingError(ValueError):
    """An action on a page element cannot be scored without the elements of its page."""


@dataclass(frozen=True, slots=True)
class StepScore:
    """One sample of GUIAct.

    Attributes:
        types: whether the names are those of the label, all and in order.
        success: whether every action of the label is fulfilled; further predicted ones are ignored.
        score: mean score of the label's actions, 0 to 1.
        actions: (name, named, fulfilled, score) of every action of the label.
    """

    types: bool
    success: bool
    score: float
    actions: list[tuple[str, bool, bool, float]]


def clean(text: str) -> str:
    """A prediction without the prompt that some are published with."""
    return text.rpartition("\x04")[2].strip()


def to_pixels(place: Sequence[float], size: Size, form: str | None) -> tuple[float, ...]:
    """Coordinates x, y, x, y, ... as whole pixels.

    Args:
        place: as predicted.
        size: (width, height) of the image.
        form: "absolute" (pixels), "related" and "related_version2" (fractions), "related_version1" (thousandths), or
            None: fractions when all are within 0 to 1 and one is a fraction, else thousandths.

    Raises:
        ValueError: another form.
    """
    if form == "absolute":
        return tuple(float(int(value)) for value in place)
    return tuple(float(int(share * size[axis % 2])) for axis, share in enumerate(to_fractions(place, size, form)))


def to_fractions(place: Sequence[float], size: Size, form: str | None) -> tuple[float, ...]:
    """The same as fractions of width and height."""
    if form == "absolute":
        return tuple(value / size[axis % 2] for axis, value in enumerate(place))
    if form is None:
        shares = all(0 <= value <= 1 for value in place) and any(value % 1 for value in place)
        form = "related" if shares else "related_version1"
    if form in ("related", "related_version2"):
        return tuple(place)
    if form == "related_version1":
        return tuple(round(value / _THOUSAND, 3) for value in place)
    raise ValueError(f"position_format {form!r} must be absolute, related, related_version1 or related_version2")


def region_scores(prediction: str, label: Sequence[Box], size: Size, form: str | None = None) -> dict[str, float]:
    """GUIEnv text2bbox: mean over the predicted boxes of the best IoU with a label's; above 0.2, 0.5, 0.7, 0.9.

    Args:
        prediction: text with ``<box>``.
        label: in pixels.
        size: of the image in pixels.
        form: see ``to_pixels``.
    """
    given = [_box(to_pixels(found, size, form)) for found in boxes(prediction)]
    value = sum(max(iou(one, other) for other in label) for one in given) / len(given) if given else 0.0
    return {f"iou@{limit}": float(value > limit) for limit in THRESHOLDS}


def text_scores(prediction: str, label: str) -> dict[str, float]:
    """GUIEnv bbox2text: exact match, and F1 of the words as in SQuAD."""
    answer = clean(prediction)
    return {"text_em": float(answer == label), "text_f1": token_f1(answer, label)}


def step_score(
    given: Sequence[Action], labels: Any, size: Size, page: Elements | None, form: str | None = None
) -> StepScore:
    """GUIAct: compares predicted actions with the label's, first with first and so on.

    Args:
        given: as ``actions.read`` gives them.
        labels: the published ``actions_label``.
        size: of the image in pixels.
        page: elements of the page.
        form: see ``to_pixels``.

    Raises:
        ElementsMissingError: a label refers to an element and the page is None.
        ActionError: an invalid label.
    """
    wanted = [labels] if isinstance(labels, Mapping) else list(labels)
    results = []
    for number, label in enumerate(wanted):
        pixels = from_label(label, "absolute")
        predicted = given[number] if number < len(given) else None
        fulfilled, score = False, 0.0
        named = predicted is not None and predicted.name == pixels.name
        if predicted is not None and named:
            point = from_label(label, "related") if pixels.name == "tap" else pixels
            fulfilled, score = _compare(predicted, point, size, page, form)
        results.append((pixels.name, named, fulfilled, score))
    return StepScore(
        types=[action.name for action in given] == [name for name, *_ in results],
        success=all(fulfilled for _, _, fulfilled, _ in results),
        score=sum(score for *_, score in results) / len(results),
        actions=results,
    )


def _compare(given: Action, label: Action, size: Size, page: Elements | None, form: str | None) -> tuple[bool, float]:
    """Whether an action with the correct name is fulfilled, and its score."""
    part = FIELDS[label.name][:1]
    if part == ("element",):
        box = _box(to_pixels(given.place, size, form))
        hit = _element(box, page) == label.element
        overlap = iou(box, _box(label.place))
        if label.name != "select":
            return hit, overlap
        words = token_f1(given.text, label.text)
        return hit and words > _ENOUGH, (words + overlap) / 2
    if part == ("text",):
        words = token_f1(given.text, label.text)
        return words > _ENOUGH, words
    if part == ("point",):
        distance = math.dist(to_fractions(given.place, size, form), label.place)
        return (True, 1 - distance / TAP_DISTANCE) if distance <= TAP_DISTANCE else (False, 0.0)
    if label.name == "select_text":
        overlap = iou(_region(to_pixels(given.place, size, form)), _region(label.place))
        return overlap > _ENOUGH, overlap
    if part == ("scroll",):
        down, right = given.place if form == "absolute" else (given.place[0] * size[1], given.place[1] * size[0])
        same = _direction(right, down) == _direction(label.place[1], label.place[0])
        return same, float(same)
    if part == ("dual_point",):
        same = _way(to_pixels(given.place, size, form)) == _way(label.place)
        return same, float(same)
    return True, 1.0


def _element(box: Box, page: Elements | None) -> int:
    """Id of the element of a box: the one it covers best, or the nearest to its centre; -1 on an empty page."""
    if page is None:
        raise ElementsMissingError("actions on page elements (click, hover, select) need the elements of the page")
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    best, nearest = (0.0, -1), (math.inf, -1)
    for element in page:
        rect = element["rect"]
        left, top = float(rect["x"]), float(rect["y"])
        right, bottom = left + float(rect["width"]), top + float(rect["height"])
        distance = math.hypot(max(left - x, 0, x - right), max(top - y, 0, y - bottom))
        covered = iou(box, (left, top, right, bottom))
        if covered > best[0]:
            best = (covered, int(element["uid"]))
        if distance < nearest[0]:
            nearest = (distance, int(element["uid"]))
    return best[1] if best[0] > _COVERS else nearest[1]


def _box(place: Sequence[float]) -> Box:
    return (place[0], place[1], place[2], place[3])


def _region(place: Sequence[float]) -> Box:
    """From the left point to the right one; empty for an upward selection."""
    x1, y1, x2, y2 = place
    return (x2, y2, x1, y1) if x1 > x2 else (x1, y1, x2, y2)


def _direction(right: float, down: float) -> str:
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _way(place: Sequence[float]) -> str:
    return _direction(place[2] - place[0], place[3] - place[1])


def score_file(
    labels: Iterable[Mapping[str, Any]],
    predictions: Mapping[str, Mapping[str, Any]],
    pages: Mapping[str, Elements] | None,
    form: str | None = None,
) -> dict[str, Any]:
    """All scores of one published test file.

    Args:
        labels: its records, of GUIEnv or of GUIAct.
        predictions: by uid, with ``pred`` and perhaps ``position_format`` and ``string_format``; a sample without one
            counts as wrong.
        pages: elements by image id, None where there are none.
        form: default unit for predictions that do not name theirs.

    Returns:
        samples, missing, and the means: text_em, text_f1, iou@...; or type_em, step_success, action_score, ``actions``
        (by name) and ``groups`` (by the names of a whole label).
    """
    sums: dict[str, list[float]] = defaultdict(list)
    steps: list[StepScore] = []
    missing = total = 0
    for record in labels:
        total += 1
        prediction = predictions.get(record["uid"], {})
        missing += not prediction
        text = str(prediction.get("pred", ""))
        unit = prediction.get("position_format") or form
        size = (float(record["image_size"]["width"]), float(record["image_size"]["height"]))
        if record.get("task_type") == "bbox2text":
            figures = text_scores(text, record["answer"])
        elif record.get("task_type") == "text2bbox":
            regions = record["answer"]["absolute"]
            label = boxes("\n".join(regions) if isinstance(regions, list) else regions)
            figures = region_scores(text, label, size, unit)
        else:
            written = prediction.get("parse_format") or prediction.get("string_format") or "CSV_String"
            given = read(clean(text), written) if prediction else []
            page = None if pages is None else pages.get(record["image_id"], [])
            steps.append(step_score(given, record["actions_label"], size, page, unit))
            continue
        for key, value in figures.items():
            sums[key].append(value)
    means = {key: sum(values) / len(values) for key, values in sums.items()}
    return {"samples": total, "missing": missing, **means, **(_steps(steps) if steps else {})}


def _steps(steps: Sequence[StepScore]) -> dict[str, Any]:
    by_name: dict[str, list[tuple[bool, bool, float]]] = defaultdict(list)
    by_group: dict[str, list[StepScore]] = defaultdict(list)
    for step in steps:
        by_group[", ".join(name for name, *_ in step.actions)].append(step)
        for name, named, fulfilled, score in step.actions:
            by_name[name].append((named, fulfilled, score))
    return {
        "type_em": _mean(step.types for step in steps),
        "step_success": _mean(step.success for step in steps),
        "action_score": _mean(step.score for step in steps),
        "actions": {
            name: {
                "count": len(found),
                "named": _mean(named for named, _, _ in found),
                "success": _mean(fulfilled for _, fulfilled, _ in found),
                "score": _mean(score for _, _, score in found),
            }
            for name, found in sorted(by_name.items(), key=lambda item: -len(item[1]))
        },
        "groups": {
            names: {
                "count": len(found),
                "success": _mean(step.success for step in found),
                "score": _mean(step.score for step in found),
            }
            for names, found in sorted(by_group.items(), key=lambda item: -len(item[1]))
        },
    }


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
