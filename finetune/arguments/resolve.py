"""Command line over file over defaults: one command line for the parser, and where each flag on it comes from."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from finetune.arguments import llamafactory
from finetune.arguments.argv import Words, flatten, group, read_file, split_file
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
        words: ``--flag value ...`` in our flags, each flag once.
        origins: where the value of each flag was read, e.g. "x.yaml: lora_rank" or "command line".
        file: the YAML file, where there is one.
    """

    words: list[str]
    origins: dict[str, str]
    file: Path | None


def resolve(argv: Sequence[str], known: Mapping[str, bool], command: str = "train") -> Resolved:
    """One command line of our flags from a file in front, if any, and the words behind it, which count more.

    A file that uses keys of LLaMA-Factory that we do not have takes LLaMA-Factory's defaults for absent ones.

    Args:
        argv: ``[FILE.yaml] --flag value ...``; behind a file also ``flag=value``.
        known: our flags, without dashes, and whether they take several words; where they do not, several are joined by
            commas (a list in a file).
        command: "train" or "export"; which of LLaMA-Factory's keys count.

    Raises:
        ArgumentError: no such file, a key that nobody knows, a value that this tool has nothing for, or a flag that is
            given twice in one place under two names.
    """
    path, rest = split_file(argv)
    typed, stray = group(translate(rest), pairs=path is not None)
    ours = set(known)
    keys: Flags = {}
    flags: Flags = {}
    theirs = False
    if path is not None:
        written, _ = group(translate(read_file(path)))
        _check_names(path, written, ours)
        theirs = any(llamafactory.is_foreign(key, ours) for key in written)
        _sort_out(written, _FILE, str(path), ours, theirs, keys, flags)
    _sort_out(typed, _COMMAND_LINE, "command line", ours, theirs, keys, flags)
    if theirs:
        keys = {**llamafactory.defaults(keys, command), **keys}
        if command == "train":
            logger.info("%s uses LLaMA-Factory's keys: what it leaves out takes LLaMA-Factory's defaults", path)
            flags = {**llamafactory.training_defaults(), **flags}
    chosen = _choose(llamafactory.translate(keys, command), flags)
    if theirs and command == "train":
        chosen = _same_rate(chosen)
    words = {name: given.words if known.get(name, True) else [",".join(given.words)] for name, given in chosen.items()}
    return Resolved([*stray, *flatten(words)], {name: given.origin for name, given in chosen.items()}, path)


def nearest(name: str, known: Collection[str]) -> str:
    """A hint at the nearest known name, empty when there is none."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_names(path: Path, written: Words, ours: set[str]) -> None:
    known = {*ours, *rows(), *legacy_names()}
    unknown = [f"{key}{nearest(key, known)}" for key in written if key not in known]
    if unknown:
        raise ArgumentError(f"{path}: unknown: {', '.join(unknown)}")


def _sort_out(words: Words, layer: int, where: str, ours: set[str], theirs: bool, keys: Flags, flags: Flags) -> None:
    """Puts every word of a layer with LLaMA-Factory's keys or with our flags."""
    for given, said in words.items():
        name, values = _switch(given, ours) if not said else (given, said)
        foreign = name in rows() and (theirs or name not in ours)
        origin = where if where == "command line" and name in ours else f"{where}: {name}"
        target = keys if foreign else flags
        target[name] = Given(values, layer, origin)


def _switch(name: str, ours: set[str]) -> tuple[str, list[str]]:
    """A flag that stands alone: it switches on, and with no_ in front off."""
    if name not in ours and name.startswith("no_") and name.removeprefix("no_") in ours:
        return name.removeprefix("no_"), ["false"]
    return name, ["true"]


def _choose(translated: Flags, direct: Flags) -> Flags:
    """Of two values for a flag the one of the later layer."""
    chosen = dict(direct)
    for name, given in translated.items():
        other = direct.get(name)
        if other is None or given.layer > other.layer:
            chosen[name] = given
        elif given.layer == other.layer and given.words != other.words:
            raise ArgumentError(
                f"{given.origin} says {name} {' '.join(given.words)}, {other.origin} says {' '.join(other.words)}: "
                "leave one of them out"
            )
    return chosen


def _same_rate(flags: Flags) -> Flags:
    """LLaMA-Factory has one learning rate for all parts that are trained."""
    trained = [part for part in ("vision", "resampler") if flags[f"tune_{part}"].words == ["true"]]
    return {**{f"{part}_lr": flags["learning_rate"] for part in trained}, **flags}


def refuse_unknown(words: Sequence[str], known: Sequence[str]) -> NoReturn:
    """Refuses what no flag takes.

    Args:
        words: flags, perhaps with their values, or words that stand alone.
        known: all flags.

    Raises:
        ArgumentError: with the nearest known flag.
    """
    names = [word for word in words if word.startswith("--")] or words
    hints = []
    for name in names:
        close = difflib.get_close_matches(name.partition("=")[0], known, n=1)
        hints.append(f"{name} (did you mean {close[0]}?)" if close else name)
    raise ArgumentError(f"unknown: {', '.join(hints)}; --help lists every flag")
