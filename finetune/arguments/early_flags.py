"""Parses the flags of a training without importing torch, and checks their names, types and numeric ranges."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.arguments.argv import parse_bool, parse_flags
from finetune.arguments.flag_names import flag_types, own_flags, takes_many
from finetune.arguments.ranges import check_not_empty, check_ranges
from finetune.arguments.resolve import refuse_unknown, resolve
from finetune.utils.errors import ArgumentError


def early_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """The flags of a command line with their values, names, types and numeric ranges checked.

    Args:
        argv: ``[FILE.yaml] --flag value ...``, as finetune.py takes it.

    Raises:
        ArgumentError: a name that no flag has, a value of another type, or a number out of range.
    """
    types = flag_types()
    with without_warnings():
        resolved = resolve(argv, takes_many())
    check_not_empty(resolved.argv)
    flags, stray = parse_flags(resolved.argv)
    unknown = [*stray, *(f"--{name}" for name in flags if name not in types)]
    if unknown:
        refuse_unknown(unknown, [f"--{name}" for name in types])
    check_ranges({name: _typed(name, values, types[name]) for name, values in flags.items()}, resolved.origins)
    for name, values in flags.items():
        _check_choice(name, values)
    return flags


def values_of(flags: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The flags with numbers and switches as such, others as the text that was given; several values as a list."""
    types = flag_types()
    found = {name: _typed(name, values, types[name]) for name, values in flags.items()}
    given = {name: values[0] if len(values) == 1 else list(values) for name, values in flags.items()}
    return {name: given[name] if value is None else value for name, value in found.items()}


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps our warnings to the run, which gives them again."""
    own, quiet = logging.getLogger("finetune"), logging.NullHandler()
    own.addHandler(quiet)
    try:
        yield
    finally:
        own.removeHandler(quiet)


def _check_choice(name: str, values: Sequence[str]) -> None:
    choices = own_flags()[name].choices if name in own_flags() else ()
    if choices and (wrong := [value for value in values if value not in choices]):
        raise ArgumentError(f"--{name} {wrong[0]}: it is {', '.join(choices)}")


def _typed(name: str, values: Sequence[str], annotation: str) -> float | bool | None:
    """The value of a flag that takes one number or a switch; None for others.

    Raises:
        ArgumentError: it is neither.
    """
    kinds = {kind.strip() for kind in annotation.replace("Optional", "|").replace("[", "|").replace("]", "").split("|")}
    kinds -= {"None", ""}
    if len(values) != 1 or not kinds or not kinds <= {"int", "float", "bool"}:
        return None
    (value,) = values
    if kinds == {"bool"}:
        return parse_bool(f"--{name}", value)
    try:
        return int(value) if kinds == {"int"} else float(value)
    except ValueError:
        wanted = "a whole number" if kinds == {"int"} else "a number"
        if "bool" in kinds:
            return parse_bool(f"--{name}", value)
        raise ArgumentError(f"--{name} {value}: {wanted} is wanted") from None
