"""Actions of GUIAct: parsing of labels and predictions, and the text format for training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_WORDS = re.compile(r"</?(?:box|point)>|\b(?:down|right)\b|[,()]")
_MARKED = re.compile(r"<(box|point)>(.*?)</\1>", re.DOTALL)
_FORMS = ("absolute", "related")

# Action name -> its arguments.
FIELDS: dict[str, tuple[str, ...]] = {
    "click": ("element",),
    "hover": ("element",),
    "tap": ("point",),
    "input": ("text",),
    "answer": ("text",),
    "select": ("element", "text"),
    "select_text": ("dual_point",),
    "swipe": ("dual_point",),
    "scroll": ("scroll",),
    "enter": (),
    "copy": (),
    "go_back": (),
    "go_home": (),
    "task_complete": (),
    "task_impossible": (),
}
_SYNONYMS = {"copy_text": "copy"}
# A line that begins with one of these is parsed as that action, whatever follows, as in the published scorer.
_BARE = ("enter", "copy")


class ActionError(ValueError):
    """Text or label that is not a valid action."""


@dataclass(frozen=True, slots=True)
class Action:
    """One action.

    Attributes:
        name: a key of FIELDS.
        place: its coordinates in one unit: four of a box, two of a point, four of a drag (from, to), (down, right) of a
            scroll, empty for actions without coordinates.
        text: what is typed, chosen or answered.
        element: id of the page element in the label, None without one.
    """

    name: str
    place: tuple[float, ...] = ()
    text: str = ""
    element: int | None = None


def numbers(text: str, count: int) -> tuple[float, ...]:
    """The numbers of a text, separated by blanks, commas, parentheses, words and tags such as <point>.

    Raises:
        ActionError: not ``count`` of them, or additional text.
    """
    found = tuple(float(value) for value in _NUMBER.findall(text))
    if len(found) != count:
        raise ActionError(f"{text!r} has {len(found)} numbers instead of {count}")
    if rest := _NUMBER.sub("", _WORDS.sub("", text)).strip(" \t\n"):
        raise ActionError(f"{text!r} has {rest!r} beside its numbers")
    return found


def from_label(label: Mapping[str, Any], form: str) -> Action:
    """The action of a published label.

    Args:
        label: ``name`` and, by FIELDS, ``element``, ``point``, ``dual_point`` or ``scroll`` with their forms, ``text``.
        form: "absolute" (pixels) or "related" (share of width and height).

    Raises:
        ActionError: an unknown name, or a missing argument.
    """
    assert form in _FORMS
    name = str(label.get("name", "")).lower()
    name = _SYNONYMS.get(name, name)
    if name not in FIELDS:
        raise ActionError(f"unknown action {label.get('name')!r}")
    place: tuple[float, ...] = ()
    element = None
    for part in FIELDS[name]:
        value = label.get(part)
        if part == "text":
            if not isinstance(value, str):
                raise ActionError(f"{name} has no 'text'")
            continue
        if not isinstance(value, Mapping) or form not in value:
            raise ActionError(f"{name} has no {part!r} in its {form} form")
        place = _place(part, value[form])
        if part == "element" and value.get("id") is not None:
            element = int(value["id"])
    return Action(name, place, str(label.get("text", "")) if "text" in FIELDS[name] else "", element)


def _place(part: str, value: Any) -> tuple[float, ...]:
    if part in ("element", "point"):
        return numbers(str(value), 4 if part == "element" else 2)
    if part == "dual_point":
        return numbers(str(value["from"]), 2) + numbers(str(value["to"]), 2)
    return numbers(str(value["down"]), 1) + numbers(str(value["right"]), 1)


def write(actions: Sequence[Action], form: str = "parentheses") -> str:
    """Text of actions with coordinates in thousandths: ``click, <box>(49,292),(415,328)</box>``, one each.

    Line breaks inside a text become spaces, because each line is one action.
    """
    lines = []
    for action in actions:
        parts = [action.name]
        kind = next((part for part in FIELDS[action.name] if part != "text"), None)
        if kind == "element":
            parts.append(box(action.place, form))
        elif kind == "point":
            parts.append(point(action.place, form))
        elif kind == "dual_point":
            parts.append(f"from {point(action.place[:2], form)} to {point(action.place[2:], form)}")
        elif kind == "scroll":
            parts.append("down {:.0f} right {:.0f}".format(*action.place))
        if "text" in FIELDS[action.name]:
            parts.append(" ".join(action.text.split()))
        lines.append(", ".join(parts))
    return "\n".join(lines)


def box(place: Sequence[float], form: str = "parentheses") -> str:
    """``<box>(x1,y1),(x2,y2)</box>``, or with form "plain" ``<box>x1 y1 x2 y2</box>``."""
    values = [f"{value:.0f}" for value in place]
    if form == "plain":
        return f"<box>{' '.join(values)}</box>"
    return "<box>({},{}),({},{})</box>".format(*values)


def point(place: Sequence[float], form: str = "parentheses") -> str:
    """``<point>(x,y)</point>``, or with form "plain" ``<point>x y</point>``."""
    values = [f"{value:.0f}" for value in place]
    return f"<point>{' '.join(values)}</point>" if form == "plain" else "<point>({},{})</point>".format(*values)


def read(text: str, form: str = "CSV_String") -> list[Action]:
    """Parses predicted actions, coordinates in their own unit; empty when any part cannot be parsed.

    Only text after the last ``actions:`` is parsed. A line without a known action name is an answer, as in the
    published scorer.

    Args:
        text: the prediction.
        form: "CSV_String" (lines), "JSON" or "JSONL".
    """
    for mark in ("actions:", "## Next Actions"):
        if mark in text:
            text = text.rpartition(mark)[2]
            break
    try:
        if form in ("JSON", "JSONL"):
            return _from_json(text)
        return [_line(line) for line in text.strip().split("\n")]
    except (ActionError, json.JSONDecodeError):
        return []


def _line(line: str) -> Action:
    name, comma, rest = (part.strip() for part in line.partition(","))
    for bare in _BARE:
        if line.strip().startswith(bare):
            return Action(bare)
    if name not in FIELDS or bool(comma) != bool(FIELDS[name]):
        return Action("answer", text=line.strip())
    kinds = FIELDS[name]
    if kinds == ("text",):
        return Action(name, text=rest)
    if not kinds:
        return Action(name)
    if kinds == ("scroll",):
        return Action(name, numbers(rest, 2))
    marked = _MARKED.findall(rest)
    wanted = ["point", "point"] if kinds == ("dual_point",) else ["box" if "element" in kinds else "point"]
    if [mark for mark, _ in marked] != wanted:
        raise ActionError(f"{line!r} lacks {' and '.join(wanted)}")
    place = tuple(value for mark, inner in marked for value in numbers(inner, 4 if mark == "box" else 2))
    text = rest.rpartition("</box>")[2].lstrip(" ,").strip() if "text" in kinds else ""
    return Action(name, place, text)


def _from_json(text: str) -> list[Action]:
    loaded = json.loads(text.rpartition("```json")[2].partition("```")[0].strip())
    actions = loaded if isinstance(loaded, list) else [loaded]
    if not all(isinstance(action, dict) for action in actions):
        raise ActionError(f"{text!r} is not a list of actions")
    # The form of the labels without their forms: {"element": "<box>...</box>"}.
    return [
        from_label({key: value if key in ("name", "text") else {"related": value} for key, value in action.items()},
                   "related")
        for action in actions
    ]  # fmt: skip
