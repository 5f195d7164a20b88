"""Merges command line, YAML file and defaults into one command line for the parser, with the origin of each flag."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from finetune.arguments import llamafactory
from finetune.arguments.argv import Values, parse_flags, read_file, split_file, to_argv
from finetune.arguments.legacy import legacy_names, translate
from finetune.arguments.llamafactory import Flags, Given
from finetune.arguments.llamafactory_table import rows
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

_FILE, _COMMAND_LINE = 1, 2


@dataclass(frozen=True, slots=True)
class Resolved:
    """A command line for the parser.

    Attributes:
        argv: ``--flag value ...`` with our flags, each flag once.
        origins: where the value of each flag was given, e.g. "x.yaml: lora_rank" or "command line".
        file: the YAML file, if any.
    """

    argv: list[str]
    origins: dict[str, str]
    file: Path | None


def resolve(argv: Sequence[str], known: Mapping[str, bool], command: str = "train") -> Resolved:
    """Merges a YAML file, if any, and the flags after it, which override it.

    A file with keys that only LLaMA-Factory has uses LLaMA-Factory's defaults for missing keys.

    Args:
        argv: ``[FILE.yaml] --flag value ...``; after a file also ``flag=value``.
        known: our flags, without dashes, and whether they take several values; a list for another flag is joined by
            commas.
        command: "train" or "export"; which of LLaMA-Factory's keys are read.

    Raises:
        ArgumentError: no such file, an unknown key, an unsupported value, or a flag that is given in one place under
            two names.
    """
    path, rest = split_file(argv)
    typed, stray = parse_flags(translate(rest), pairs=path is not None)
    ours = set(known)
    keys: Flags = {}
    flags: Flags = {}
    theirs = False
    if path is not None:
        written, _ = parse_flags(translate(read_file(path)))
        _check_names(path, written, ours)
        theirs = llamafactory.is_llamafactory_file(written, ours)
        _split(written, _FILE, str(path), ours, theirs, keys, flags)
    _split(typed, _COMMAND_LINE, "command line", ours, theirs, keys, flags)
    if theirs:
        keys = {**llamafactory.defaults(keys, command), **keys}
        if command == "train":
            logger.info("%s uses LLaMA-Factory's keys: missing keys have LLaMA-Factory's defaults", path)
            flags = {**llamafactory.training_defaults(), **flags}
    chosen = _choose(llamafactory.translate(keys, command), flags)
    if theirs and command == "train":
        chosen = _same_learning_rate(chosen)
    values = {
        name: given.values if known.get(name, True) else [",".join(given.values)] for name, given in chosen.items()
    }
    return Resolved([*stray, *to_argv(values)], {name: given.origin for name, given in chosen.items()}, path)


def nearest(name: str, known: Collection[str]) -> str:
    """A hint with the nearest known name; empty if there is none."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_names(path: Path, written: Values, ours: set[str]) -> None:
    known = {*ours, *rows(), *legacy_names()}
    unknown = [f"{key}{nearest(key, known)}" for key in written if key not in known]
    if unknown:
        raise ArgumentError(f"{path}: unknown: {', '.join(unknown)}")


def _split(entries: Values, layer: int, where: str, ours: set[str], theirs: bool, keys: Flags, flags: Flags) -> None:
    """Splits the entries of a layer into LLaMA-Factory's keys and our flags."""
    for entry, given in entries.items():
        name, values = (entry, given) if given else _switch(entry, ours)
        is_key = name in rows() and (theirs or name not in ours)
        origin = where if where == "command line" and name in ours else f"{where}: {name}"
        target = keys if is_key else flags
        target[name] = Given(values, layer, origin)


def _switch(name: str, ours: set[str]) -> tuple[str, list[str]]:
    """Name and value of a flag without a value: true, or false with the prefix no_."""
    if name not in ours and name.startswith("no_") and name.removeprefix("no_") in ours:
        return name.removeprefix("no_"), ["false"]
    return name, ["true"]


def _choose(translated: Flags, direct: Flags) -> Flags:
    """Merges flags; of two values the one of the higher layer is used."""
    chosen = dict(direct)
    for name, given in translated.items():
        other = direct.get(name)
        if other is None or given.layer > other.layer:
            chosen[name] = given
        elif given.layer == other.layer and given.values != other.values:
            raise ArgumentError(
                f"{given.origin} says {name} {' '.join(given.values)}, {other.origin} says {' '.join(other.values)}: "
                "remove one of them"
            )
    return chosen


def _same_learning_rate(flags: Flags) -> Flags:
    """LLaMA-Factory has one learning rate for all trained parts."""
    trained = [part for part in ("vision", "resampler") if flags[f"tune_{part}"].values == ["true"]]
    return {**{f"{part}_lr": flags["learning_rate"] for part in trained}, **flags}


def refuse_unknown(unknown: Sequence[str], known: Sequence[str]) -> NoReturn:
    """Refuses unknown flags.

    Args:
        unknown: unknown flags, perhaps with their values, or stray values.
        known: all flags.

    Raises:
        ArgumentError: with the nearest known flag.
    """
    names = [argument for argument in unknown if argument.startswith("--")] or unknown
    hints = []
    for name in names:
        if Path(name).is_dir():
            inside = sorted(Path(name).glob("*.yaml"))
            hints.append(f"{name} is a folder, give a YAML file" + (f" (did you mean {inside[0]}?)" if inside else ""))
            continue
        close = difflib.get_close_matches(name.partition("=")[0], known, n=1)
        hints.append(f"{name} (did you mean {close[0]}?)" if close else name)
    raise ArgumentError(f"unknown: {', '.join(hints)}; --help lists every flag")
