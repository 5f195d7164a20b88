"""Converts published records of GUIEnv, GUIAct and GUIChat to training records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from finetune.guicourse.actions import Action, ActionError, box, from_label, numbers, point, write

# Prompts of the published data preparation, verbatim: predictions are comparable only with the same prompt.
_REGION = (
    "## Your Task\nIf the input is a string, please give me the element regions including this string. Else if the "
    "input is a region, please give me the string (text) in this region.## Input\n{}\n## Output\n"
)
_NEXT = "Generate next actions to do this task."
_TAG = re.compile(r"<image(?:_\d+)?>")
_PICTURE = re.compile(r"<image>(.*?)</image>", re.DOTALL)
_MARKED = re.compile(r"<(box|point)>(.*?)</\1>", re.DOTALL)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_THOUSAND = 1000


class RecordError(ValueError):
    """An invalid published record."""


def kind(record: Mapping[str, Any]) -> str:
    """Which data set a record belongs to, by its keys: "guienv", "guiact" or "guichat".

    Raises:
        RecordError: to none.
    """
    for key, name in (("task_type", "guienv"), ("actions_label", "guiact"), ("text", "guichat")):
        if key in record:
            return name
    raise RecordError(f"has neither task_type (GUIEnv), actions_label (GUIAct) nor text (GUIChat), but {list(record)}")


def image_ids(record: Mapping[str, Any]) -> list[str]:
    """The images of a record in order; GUIChat may name several in its text.

    Raises:
        RecordError: it names none.
    """
    turns = record.get("text") if isinstance(record.get("text"), list) else []
    named = [
        name.strip()
        for turn in turns or []
        if isinstance(turn, Mapping) and _ROLES.get(str(turn.get("from"))) == "user"
        for name in _PICTURE.findall(str(turn.get("value", "")))
    ]
    if not named and not record.get("image_id"):
        raise RecordError("has no 'image_id'")
    return named or [str(record["image_id"])]


def to_training(record: Mapping[str, Any], paths: Mapping[str, str], form: str = "parentheses") -> dict[str, Any]:
    """The record of training data: ``id``, ``image``, ``conversations``; coordinates in thousandths.

    Args:
        record: as published.
        paths: image files by image id.
        form: of boxes and points, "parentheses" ``(x1,y1),(x2,y2)`` or "plain" ``x1 y1 x2 y2``.

    Raises:
        RecordError: something is missing, lies outside the image, or would be parsed as an image tag.
    """
    if not isinstance(record.get("uid"), str):
        raise RecordError("has no 'uid'")
    images = []
    for name in image_ids(record):
        if name not in paths:
            raise RecordError(f"image {name!r} is not in the image files")
        images.append(paths[name])
    try:
        turns = _BUILDERS[kind(record)](record, form)
    except ActionError as error:
        raise RecordError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise RecordError(f"is not of the published form: {type(error).__name__} {error}") from error
    tags = sum(len(_TAG.findall(turn["content"])) for turn in turns if turn["role"] == "user")
    if tags != len(images):
        raise RecordError(f"{tags} image tags in its text for {len(images)} images")
    return {"id": record["uid"], "image": images[0] if len(images) == 1 else images, "conversations": turns}


def _env(record: Mapping[str, Any], form: str) -> list[dict[str, str]]:
    """GUIEnv: the text in a region, or the regions of a text."""
    question, answer = record.get("question"), record.get("answer")
    task = record["task_type"]
    if task == "bbox2text" and isinstance(question, Mapping) and isinstance(answer, str):
        question = box(_thousandths(question["related"]), form)
    elif task == "text2bbox" and isinstance(answer, Mapping) and isinstance(question, str):
        regions = answer["related"] if isinstance(answer["related"], list) else [answer["related"]]
        answer = "\n".join(box(_thousandths(region), form) for region in regions)
    else:
        raise RecordError(f"task_type {task!r} with a {type(question).__name__} for question and a "
                          f"{type(answer).__name__} for answer")  # fmt: skip
    if not answer.strip():
        raise RecordError("has an empty answer")
    return _exchange(_REGION.format(question), answer)


def _act(record: Mapping[str, Any], form: str) -> list[dict[str, str]]:
    """GUIAct: the next actions, after the thoughts where there are some."""
    _inside(record)
    prompt = ""
    for key, title in (("actions_history", "Actions History"), ("logs", "Informations")):
        if value := record.get(key):
            prompt += f"{title}\n{value if isinstance(value, str) else chr(10).join(map(str, value))}\n"
    prompt += f"Your Task\n{record['question']}\n{_NEXT}"
    labels = record["actions_label"]
    actions = [from_label(label, "related") for label in ([labels] if isinstance(labels, Mapping) else labels)]
    if not actions:
        raise RecordError("has no action")
    thoughts = f"thoughts: {record['thoughts']}\n" if record.get("thoughts") else ""
    return _exchange(prompt, f"{thoughts}actions:\n{write([_scaled(action) for action in actions], form)}")


def _chat(record: Mapping[str, Any], form: str) -> list[dict[str, str]]:
    """GUIChat: a conversation about a page, its coordinates in thousandths already, or in fractions."""
    turns = []
    for number, turn in enumerate(record["text"]):
        role = _ROLES.get(str(turn.get("from")))
        if role is None or not isinstance(turn.get("value"), str):
            raise RecordError(f"turn {number} has neither a known 'from' nor a 'value': {str(turn)[:80]}")
        text = _PICTURE.sub("<image>", turn["value"]) if role == "user" else turn["value"]
        turns.append({"role": role, "content": _MARKED.sub(lambda found: _mark(found[1], found[2], form), text)})
    if turns and not any(_TAG.search(turn["content"]) for turn in turns):
        turns[0]["content"] = f"<image>\n{turns[0]['content']}"
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [turn["role"] for turn in turns] != expected:
        raise RecordError("its turns do not alternate between question and answer")
    return turns


def _mark(name: str, inner: str, form: str) -> str:
    values = numbers(inner, 4 if name == "box" else 2)
    if all(value <= 1 for value in values) and any(value % 1 for value in values):
        values = tuple(value * _THOUSAND for value in values)
    return box(values, form) if name == "box" else point(values, form)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]


def _thousandths(text: Any) -> tuple[float, ...]:
    # The published fractions have three decimals; rounding is exact.
    return tuple(float(round(value * _THOUSAND)) for value in numbers(str(text), 4))


def _scaled(action: Action) -> Action:
    return replace(action, place=tuple(float(round(value * _THOUSAND)) for value in action.place))


def _inside(record: Mapping[str, Any]) -> None:
    """Refuses a record whose boxes or points leave its image, as the published preparation does."""
    size = record.get("image_size")
    if not isinstance(size, Mapping) or "width" not in size or "height" not in size:
        raise RecordError("has no 'image_size' with width and height")
    limits = (float(size["width"]), float(size["height"]))
    for name, inner in _MARKED.findall(f"{record.get('question')}{record['actions_label']}"):
        values = numbers(inner, 4 if name == "box" else 2)
        if any(not 0 <= value <= limits[place % 2] for place, value in enumerate(values)):
            raise RecordError(f"<{name}>{inner}</{name}> leaves the image of {limits[0]:.0f} x {limits[1]:.0f} pixels")


_BUILDERS: dict[str, Callable[[Mapping[str, Any], str], list[dict[str, str]]]] = {
    "guienv": _env,
    "guiact": _act,
    "guichat": _chat,
}
