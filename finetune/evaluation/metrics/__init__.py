"""Metric registry: built-in metrics by name, custom functions by module or file path."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from finetune.evaluation.metrics.boxes import BOX_IOU, POINT_IN_BOX
from finetune.evaluation.metrics.default_metric import choose
from finetune.evaluation.metrics.edit_distance import ANLS, CER, ROUGE_L, WER
from finetune.evaluation.metrics.json_fields import JSON_F1
from finetune.evaluation.metrics.metric import Metric, MetricError, failed, own
from finetune.evaluation.metrics.text import CHOICE, EXACT, NORMALISED, RELAXED, TOKEN_F1
from finetune.evaluation.metrics.vqa import VQA

__all__ = ["METRICS", "Metric", "MetricError", "choose", "resolve_metric"]

_ALL = (EXACT, NORMALISED, VQA, ANLS, RELAXED, TOKEN_F1, CER, WER, ROUGE_L, CHOICE, BOX_IOU, POINT_IN_BOX, JSON_F1)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def resolve_metric(name: str, references: list[list[str]]) -> tuple[Metric, str]:
    """The metric for a name, and the reason for the choice.

    Args:
        name: a key of METRICS; "auto", chosen from the format of the references; or ``package.module:function`` or
            ``path/to/file.py:function``, called with one prediction (str) and its references (list of str), giving a
            number or a dictionary of numbers.
        references: accepted answers of every sample.

    Raises:
        MetricError: no such metric, module or function.
    """
    if name == "auto":
        chosen, reason = choose(references)
        return METRICS[chosen], f"auto: {reason}"
    if name in METRICS:
        return METRICS[name], "as requested"
    where, colon, function = name.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, [*METRICS, "auto"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MetricError(
            f"unknown metric {name!r}; {hint}available: auto, {', '.join(METRICS)}, "
            "and custom ones as package.module:function or file.py:function"
        )
    found = getattr(_module(where, name), function, None)
    if not callable(found):
        raise MetricError(f"metric {name!r}: {where} has no function {function!r}")
    return own(function, found), f"the function {name}"


def _module(where: str, name: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise MetricError(
                f"metric {name!r}: {error}; is the package installed, or its folder in PYTHONPATH?"
            ) from error
        except Exception as error:  # noqa: BLE001 - user code, which may raise anything
            raise failed(name, error) from error
    path = Path(where)
    if not path.is_file():
        raise MetricError(f"metric {name!r}: no such file {path} (looked from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass in the file looks its module up by name.
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - user code, which may raise anything
        raise failed(name, error) from error
    return module
