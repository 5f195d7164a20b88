"""json_f1: F1 of the fields of JSON answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from finetune.evaluation.metrics.metric import Metric, best

_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def parse(text: str) -> Any:
    """The JSON object or array that a text is, or holds between ``` fences or its first and last bracket.

    Raises:
        ValueError: it holds none.
    """
    fenced = _FENCE.search(text)
    body = (fenced[1] if fenced else text).strip()
    start = min((at for at in (body.find("{"), body.find("[")) if at >= 0), default=-1)
    end = max(body.rfind("}"), body.rfind("]"))
    if start < 0 or end < start:
        raise ValueError("neither an object nor an array")
    return json.loads(body[start : end + 1])


def fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of every leaf; the elements of a list share one path, so their order does not count."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from fields(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner, f"{path}[]")
    else:
        # 3, 3.0 and "3" are one value.
        number = isinstance(value, float) and value.is_integer()
        yield path, " ".join(str(int(value) if number else value).split())


def json_f1(prediction: str, reference: str) -> float:
    """F1 of the fields (path and value), each leaf of the JSON being one; 0 for an answer that is not JSON.

    Source: the field F1 of Donut (Kim et al., 2022, arXiv 2111.15664), without the grouping of lists.

    Raises:
        ValueError: the reference is not JSON.
    """
    wanted = Counter(fields(parse(reference)))
    try:
        given = Counter(fields(parse(prediction)))
    except ValueError:
        return 0.0
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 1.0


JSON_F1 = Metric("json_f1", best("json_f1", json_f1))
