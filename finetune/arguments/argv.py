"""Parses YAML files and command lines into names of flags and their values as strings, without interpreting them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.utils.errors import ArgumentError

# Flag or key -> its values, as on a command line.
Values = dict[str, list[str]]

_SUFFIXES = (".yaml", ".yml", ".json")
_MERGE = "tag:yaml.org,2002:merge"
# key=value after a YAML file, as OmegaConf and LLaMA-Factory take it.
_PAIR = re.compile(r"[A-Za-z_]\w*=")


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != _MERGE and key.value in lines:
                raise yaml.YAMLError(
                    f"line {line}: {key.value} is given twice, in line {lines[key.value]} too; remove one of them"
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def split_file(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The YAML (or JSON) file at the start of a command line, if any, and the remaining arguments."""
    if argv and argv[0].endswith(_SUFFIXES):
        return Path(argv[0]), list(argv[1:])
    return None, list(argv)


def read_file(path: Path) -> list[str]:
    """The flags of a file, as a command line; of a run.yaml those under ``flags``. Empty values are skipped.

    Raises:
        ArgumentError: there is no such file, or it is not a mapping of flags to values.
    """
    try:  # the loader is a safe one, with a check
        given: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ArgumentError(f"{path}: no such file (looked from {Path.cwd()})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ArgumentError(
            f"{path}{line}: not a YAML file of flags: {error.problem}; write one flag and its value a line, as in "
            "learning_rate: 1.0e-4, all with the same indent"
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: not a YAML file of flags: {' '.join(str(error).split())}") from error
    if isinstance(given, dict) and isinstance(given.get("flags"), dict) and "versions" in given:
        given = given["flags"]
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ArgumentError(f"{path}: each line should be a flag and its value, as in learning_rate: 1.0e-4")
    return mapping_to_argv(given, str(path))


def mapping_to_argv(given: Mapping[str, Any], where: str) -> list[str]:
    """The command line of flags with their values as YAML or Python has them. None is left out.

    Args:
        given: values by flag.
        where: what an error calls their origin.

    Raises:
        ArgumentError: a value is neither a text, a number, an object nor a list of them.
    """
    argv = []
    for key, value in given.items():
        if value is None:
            continue
        try:
            argv += [f"--{key}", *(_as_argument(item) for item in (value if isinstance(value, list) else [value]))]
        except (TypeError, ValueError) as error:  # a date inside of an object, or a list that contains itself
            raise ArgumentError(
                f"{where}: {key} has a value that is not a text, a number or a list of them ({error})"
            ) from error
    return argv


def _as_argument(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def parse_flags(argv: Sequence[str], *, pairs: bool = False) -> tuple[Values, list[str]]:
    """Flags with their values, the last one if a flag is repeated; and values before the first flag.

    Args:
        argv: ``--key value ...``, ``--key=value``; a flag may have no value.
        pairs: whether to parse ``key=value`` too.
    """
    flags: Values = {}
    stray: list[str] = []
    current: list[str] | None = None
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument.removeprefix("--").partition("=")
            current = flags[name] = [value] if equals else []
        elif pairs and _PAIR.match(argument):
            name, _, value = argument.partition("=")
            flags[name] = [value]
        elif current is None:
            stray.append(argument)
        else:
            current.append(argument)
    return flags, stray


def to_argv(flags: Values) -> list[str]:
    """The command line of some flags."""
    return [argument for name, values in flags.items() for argument in (f"--{name}", *values)]


def parse_bool(key: str, value: str) -> bool:
    """The value of a boolean flag.

    Raises:
        ArgumentError: neither true nor false.
    """
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if value.lower() not in known:
        raise ArgumentError(f"{key}: {value}: it must be true or false")
    return known[value.lower()]
