"""Loads llamafactory.yaml, the packaged mapping from LLaMA-Factory's configuration keys to our flags."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).with_name("llamafactory.yaml")


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key; exactly one of ``flag``, ``rule``, ``no_effect`` and ``instead`` is set.

    Attributes:
        key: LLaMA-Factory's name.
        section: title of its section in the table.
        default: LLaMA-Factory's default.
        flag: our flag that takes the value unchanged.
        rule: the rule that translates it.
        no_effect: why any value is accepted without effect.
        instead: why values other than the default are refused, and what to use.
        also: further values that are equivalent to the default.
        method: the finetuning_type it belongs to; None for all.
        ours: what our default does, if it is used instead of LLaMA-Factory's.
        export: whether `export` takes it too.
        only_export: whether only `export` takes it.
    """

    key: str
    section: str
    default: Any
    flag: str | None = None
    rule: str | None = None
    no_effect: str | None = None
    instead: str | None = None
    also: tuple[Any, ...] = ()
    method: str | None = None
    ours: str | None = None
    export: bool = False
    only_export: bool = False

    def is_default(self, values: list[str]) -> bool:
        """Whether the values are equivalent to LLaMA-Factory's default."""
        accepted = (self.default, *self.also, *((False, "") if self.default is None else ()))
        return any(_same(values, value) for value in accepted)


@lru_cache(maxsize=1)
def rows() -> dict[str, KeyRow]:
    """All keys in the order of the file."""
    return {
        key: KeyRow(key, section["title"], **_entry(section, given))
        for section in _sections()
        for key, given in section["rows"].items()
    }


@lru_cache(maxsize=1)
def other_defaults() -> dict[str, Any]:
    """Keys of transformers.TrainingArguments whose default in LLaMA-Factory differs from ours."""
    return {key: value for section in _sections() for key, value in section.get("theirs", {}).items()}


def default_values(value: Any) -> list[str] | None:
    """A default as command-line values; None for no value."""
    if value is None:
        return None
    return [str(value).lower() if isinstance(value, bool) else str(value)]


@lru_cache(maxsize=1)
def _sections() -> list[dict[str, Any]]:
    return yaml.safe_load(PATH.read_text(encoding="utf-8"))


def _entry(section: dict[str, Any], given: Any) -> dict[str, Any]:
    shared = {name: section[name] for name in ("instead", "no_effect") if name in section}
    entry = {"default": given, **shared} if shared else dict(given)
    entry["also"] = tuple(entry.get("also", ()))
    return entry


def _same(given: list[str], value: Any) -> bool:
    if len(given) != 1:
        return False
    text = given[0].lower()
    if isinstance(value, bool):
        return text in (("true", "1") if value else ("false", "0"))
    if isinstance(value, (int, float)):
        try:
            return float(text) == value
        except ValueError:
            return False
    return value is not None and text == str(value).lower()
