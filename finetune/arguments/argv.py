"""YAML files and command lines as flags with their words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.utils.errors import ArgumentError

# Flag or key -> its words, as they would stand on a command line.
Words = dict[str, list[str]]

_SUFFIXES = (".yaml", ".yml", ".json")
# What OmegaConf, and with it LLaMA-Factory, takes behind a YAML file.
_MERGE = "tag:yaml.org,2002:merge"
_PAIR = re.compile(r"[A-Za-z_]\w*=")


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice: of two values the last would count in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != _MERGE and key.value in lines:
                raise yaml.YAMLError(
                    f"line {line}: {key.value} is given twice, in line {lines[key.value]} too; leave one of them out"
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def split_file(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The YAML (or JSON) file that a command line begins with, and the rest of it."""
    if argv and argv[0].endswith(_SUFFIXES):
        return Path(argv[0]), list(argv[1:])
    return None, list(argv)


def read_file(path: Path) -> list[str]:
    """The flags of a file, as a command line; of a run.yaml those under ``flags``. Empty values are left out.

    Raises:
        ArgumentError: there is no such file, or it is no mapping of flags to values.
    """
    try:  # the loader is a safe one, with a check
        given: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ArgumentError(f"{path}: no such file (looked from {Path.cwd()})") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: not a YAML file of flags: {' '.join(str(error).split())}") from error
    if isinstance(given, dict) and isinstance(given.get("flags"), dict) and "versions" in given:
        given = given["flags"]
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ArgumentError(f"{path}: each line should be a flag and its value, as in learning_rate: 1.0e-4")
    words = []
    for key, value in given.items():
        if value is None:
            continue
        try:
            words += [f"--{key}", *(_word(item) for item in (value if isinstance(value, list) else [value]))]
        except (TypeError, ValueError) as error:  # a date inside of an object, or a list that holds itself
            raise ArgumentError(
                f"{path}: {key} has a value that is no text, number or list of them ({error})"
            ) from error
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def group(words: Sequence[str], *, pairs: bool = False) -> tuple[Words, list[str]]:
    """Flags with their words, later ones in place of earlier ones; and words that belong to none.

    Args:
        words: ``--key value ...``, ``--key=value``; a flag may stand alone.
        pairs: also ``key=value``.
    """
    flags: Words = {}
    stray: list[str] = []
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            current = flags[name] = [value] if equals else []
        elif pairs and _PAIR.match(word):
            name, _, value = word.partition("=")
            flags[name] = [value]
        elif current is None:
            stray.append(word)
        else:
            current.append(word)
    return flags, stray


def flatten(flags: Words) -> list[str]:
    """The command line of some flags."""
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def truth(key: str, value: str) -> bool:
    """A switch.

    Raises:
        ArgumentError: neither true nor false.
    """
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if value.lower() not in known:
        raise ArgumentError(f"{key}: {value}: true or false is wanted")
    return known[value.lower()]
