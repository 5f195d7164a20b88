"""The flags of a training checked without importing torch: names, types and numeric ranges."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.arguments.argv import parse_bool, parse_flags
from finetune.arguments.flag_names import flag_types, takes_many
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
    resolved = resolve(argv, takes_many())
    check_not_empty(resolved.argv)
    flags, stray = parse_flags(resolved.argv)
    unknown = [*stray, *(f"--{name}" for name in flags if name not in types)]
    if unknown:
        refuse_unknown(unknown, [f"--{name}" for name in types])
    numbers = {name: _typed(name, values, types[name]) for name, values in flags.items()}
    check_ranges(numbers, resolved.origins)
    return flags


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
